"""A traced function compiled for a machine that need not be there, and counted, in this process."""

from typing import Any

from lbpwht_jax.compile.count import Counts, count
from lbpwht_jax.compile.hlo import Program, parse
from lbpwht_jax.compile.kernels import kernel_flops
from lbpwht_jax.compile.targets import Target


def compile_traced(traced: Any, target: Target) -> tuple[Any, Program, Counts]:
    """Compiles and counts.

    Args:
      traced: ``jax.jit(function).trace(*arguments)``, the arguments being ``jax.ShapeDtypeStruct`` with shardings over devices
        of the target, as ``Placement(devices=target.open())`` makes them; within ``target.described()``.
      target: whose devices they are.

    Returns:
      What ``lower().compile()`` returns; the program that the compiler made; what it does.

    Raises:
      jax.errors.JaxRuntimeError: if the compiler refuses; a crash of it ends this process.
    """
    with target.described():
        compiled = traced.lower().compile(compiler_options=target.compiler_options)
    program = parse(compiled.as_text() or "")
    return compiled, program, count(program, kernel_flops(traced.jaxpr.jaxpr))
