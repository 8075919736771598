"""Calls of a module in the place of another one."""

from typing import Any

_CAPTURED = ("intermediates", "__call__")


def call_in_place(module: Any, args: Any, kwargs: Any) -> Any:
    """Calls a module that has the scope of one whose call an interceptor is around, which captures the result itself.

    Flax's ``capture_intermediates`` would otherwise store it twice.
    """
    scope = module.scope
    before = scope.get_variable(*_CAPTURED, ())
    result = module(*args, **kwargs)
    if scope.is_mutable_collection(_CAPTURED[0]) and scope.has_variable(*_CAPTURED):
        scope.put_variable(*_CAPTURED, before)
    return result
