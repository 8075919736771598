"""The command line, ``lbpwht``."""

from lbpwht_jax.cli.entry import main

__all__ = ["main"]
