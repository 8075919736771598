"""What compilers say of a training step on machines that need not be there: memory, bytes, FLOPs, kernels, collectives."""

from lbpwht_jax.compile.chips import CHIPS, Chip
from lbpwht_jax.compile.compiling import CompilerError, compile_model
from lbpwht_jax.compile.request import Row
from lbpwht_jax.compile.targets import Target, parse_target

__all__ = ["CHIPS", "Chip", "CompilerError", "Row", "Target", "compile_model", "parse_target"]
