"""Lets ``python -m lbpwht_jax.cli`` do what ``lbpwht`` does."""

import sys

from lbpwht_jax.cli import main

sys.exit(main())
