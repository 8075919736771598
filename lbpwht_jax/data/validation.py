"""How settings are checked: pydantic's dataclasses, with its errors on one line."""

import contextlib
from collections.abc import Iterator

from pydantic import ConfigDict, ValidationError
from pydantic_core import ErrorDetails

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
"""No value is converted to another type (but a whole number to a float), no field is unknown, every number is finite."""


@contextlib.contextmanager
def plain_errors(where: str = "") -> Iterator[None]:
    """Turns pydantic's errors into a ValueError on one line.

    Args:
      where: what was read, such as a file; it comes first in the message.

    Raises:
      ValueError: for every pydantic error; names each field, what it must be and what it was.
    """
    try:
        yield
    except ValidationError as error:
        text = "; ".join(_line(each) for each in error.errors(include_url=False))
        raise ValueError(f"{where}: {text}" if where else text) from None


def _line(error: ErrorDetails) -> str:
    name, message = ".".join(map(str, error["loc"])), error["msg"]
    if error["type"] == "missing":
        return f"{name} is missing"
    if error["type"] == "value_error":
        text = message.removeprefix("Value error, ")
        return f"{name}: {text}" if name else text
    if message.startswith("Input should "):
        return f"{name} must {message.removeprefix('Input should ')}, got {error['input']!r}"
    return f"{name}: {message}, got {error['input']!r}"
