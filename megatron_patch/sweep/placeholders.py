"""``{name}`` and its like in what a sweep file says of every trial: known ones are filled in, others are a mistake."""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_patch.errors import ConfigError

OF_TRIAL = ("config", "folder", "name", "sweep")
"""For the values of flags: what is known of a trial before it starts, and is the same when it starts again."""
PLACEHOLDERS = (*OF_TRIAL, "python", "worker", "port")
"""For command and environment."""
PLACEHOLDER = re.compile(r"(?<![$\\{])(?:\{(\{[A-Za-z][\w-]*\})\}|\{([A-Za-z][\w-]*)\})")
"""``{word}``, or ``{{word}}`` for a literal ``{word}``. A shell's ``${word}`` and a regular expression's ``\\p{L}`` are
none."""


def filled(value: Any, values: Mapping[str, str]) -> Any:
    """Return `value` with the placeholders filled in, in every entry of a list; what is no text stays as it is.

    >>> filled("runs/{name}, ${HOME}, {{name}}", {"name": "lr=0.1"})
    'runs/lr=0.1, ${HOME}, {name}'
    """
    if isinstance(value, (list, tuple)):
        return [filled(entry, values) for entry in value]
    if not isinstance(value, str):
        return value
    return PLACEHOLDER.sub(lambda match: match[1] or values[match[2]], value)


def check_placeholders(where: str, value: object, known: Sequence[str] = OF_TRIAL) -> None:
    """Raise ConfigError if there is a placeholder in `value` that is not one of `known`; `where` is for the message."""
    if isinstance(value, (list, tuple)):
        for entry in value:
            check_placeholders(where, entry, known)
    elif isinstance(value, str):
        for match in PLACEHOLDER.finditer(value):
            if match[2] and match[2] not in known:
                raise ConfigError(where, match[0], _expected(match[2], known), _remedy(match[2], known))


def _expected(name: str, known: Sequence[str]) -> str:
    late = ", which is known only when a command starts" if name in PLACEHOLDERS else ""
    return f"one of {', '.join(f'{{{other}}}' for other in known)}{late}"


def _remedy(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    literal = f"write {{{{{name}}}}} for the text {{{name}}}"
    return f"did you mean {{{near[0]}}}? ({literal})" if near else literal
