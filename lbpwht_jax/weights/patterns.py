"""Regular expressions from files: only those whose matching ends soon."""

import re

_LONGEST = 500
_MOST_STEPS = 1_000_000
_KEY_LENGTH = 100

_CHARACTER = r"(?:\\[^0-9A-Za-z]|\\[dwsDWS]|\[\^?\]?(?:[^\[\]\\]|\\.)*+\]|[^\\\[\](){}|*+?])"
_REPEAT = r"(?:[*+?]|\{[0-9]{1,3}(?:,[0-9]{0,3})?\})"
_PIECE = rf"{_CHARACTER}{_REPEAT}?\??"
_SIMPLE = re.compile(rf"(?:{_PIECE}|\((?:\?:)?(?:{_PIECE}|\|)*+\)(?![*+?{{])|\|)*+")
_TOKENS = re.compile(rf"(?:{_CHARACTER})(?P<repeat>{_REPEAT})?|(?P<sign>[(|)])")


def compile_pattern(pattern: str, where: str) -> re.Pattern:
    """Compiles a regular expression that a file gives for paths of modules.

    Characters, classes of them (``[0-9]``, ``\\d``, ``.``), repeats of these, and groups of alternatives that are not
    themselves repeated or nested are taken: what names modules needs no more, and other expressions may take for ever.

    Args:
      pattern: the expression.
      where: the file and the place in it, for messages.

    Raises:
      ValueError: if it is no regular expression, is longer than 500 characters or could take over a million steps.
    """
    if len(pattern) > _LONGEST:
        raise ValueError(f"{where}: a pattern of {len(pattern)} characters is longer than the {_LONGEST} that are matched")
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{where}: {pattern!r} is no regular expression: {error}") from None
    if not _SIMPLE.fullmatch(pattern) or _steps(pattern) > _MOST_STEPS:
        raise ValueError(
            f"{where}: {pattern!r} may take for ever to match; write the paths of modules, with at most three repeats such as "
            ".* and none of a group"
        )
    return compiled


def _steps(pattern: str) -> int:
    """How often a simple pattern may be tried on one path: alternatives multiply from group to group, and so do repeats."""
    steps, alternatives = 1, 1
    for token in _TOKENS.finditer(pattern):
        if token["repeat"]:
            steps *= _KEY_LENGTH
        elif token["sign"] == "|":
            alternatives += 1
        elif token["sign"]:
            steps, alternatives = steps * alternatives, 1
    return steps * alternatives
