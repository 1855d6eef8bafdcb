"""What can go wrong because of something a user can change, in one text format.

A `ConfigError` is printed as one line on rank 0 and ends the process with exit code 2 (see `run.py`).
Programming errors stay plain exceptions with their tracebacks.
"""

from collections.abc import Mapping, Sequence
from enum import IntEnum


class MegatronPatchError(Exception):
    """Base of all errors this package raises on purpose."""


class ConfigError(MegatronPatchError, ValueError):
    """A flag, file or combination of flags that cannot be honoured.

    The text has the form ``<flag> <got>: expected <expected>; <fix>``.

    Args:
        flag: the flag, file or YAML key as the user typed it, e.g. ``"--base-hidden-size"``.
        got: the offending value; `None` when the flag is missing altogether.
        expected: what would have been accepted, e.g. ``"a positive integer"``.
        fix: what to do now, an imperative sentence without a full stop.

    >>> str(ConfigError("--alignment-interval", -1, "an integer >= 0", "give 0 to switch the metrics off"))
    '--alignment-interval -1: expected an integer >= 0; give 0 to switch the metrics off'
    """

    def __init__(self, flag: str, got: object, expected: str, fix: str) -> None:
        self.flag = flag
        self.got = got
        self.expected = expected
        self.fix = fix
        shown = "not given" if got is None else str(got)
        super().__init__(f"{flag} {shown}: expected {expected}; {fix}".replace("\n", " "))


class ConfigErrors(ConfigError):
    """Several of them, each in a line of its own.

    Args:
        errors: two or more.
    """

    def __init__(self, errors: Sequence[ConfigError]) -> None:
        super().__init__(errors[0].flag, errors[0].got, errors[0].expected, errors[0].fix)
        self.errors = tuple(errors)
        self.args = ("\n".join(map(str, errors)),)


def raise_together(errors: Sequence[ConfigError]) -> None:
    """Raise what there is to raise: nothing, the one error, or all of them as one.

    >>> raise_together([])
    """
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise ConfigErrors(errors)


class MegatronRefuses(MegatronPatchError, ValueError):
    """Megatron's own validation does not accept the arguments.

    Args:
        said: why, in its own words.
        values: the flags that it names, with their values.

    >>> print(MegatronRefuses("heads must divide it", {"--hidden-size": 65, "--num-attention-heads": 4}))
    Megatron refuses --hidden-size 65, --num-attention-heads 4: heads must divide it
    """

    def __init__(self, said: str, values: Mapping[str, object]) -> None:
        named = ", ".join(f"{flag} {'not given' if value is None else value}" for flag, value in values.items())
        super().__init__(f"Megatron refuses {named or 'these arguments'}: {said}")


class UpstreamChanged(MegatronPatchError):
    """A Megatron symbol this package hooks is missing, has another signature, or was replaced by somebody else."""


class AuditError(MegatronPatchError):
    """The live optimizer does not hold the learning rate, weight decay or eps that the rule gives a parameter."""


class Refused(MegatronPatchError):
    """Nothing is wrong with what the user typed, but what was asked for would not be worth having."""


class ExitCode(IntEnum):
    """How a command ended; a script in `run` that ends by itself keeps its own."""

    DONE = 0
    FAILED = 1
    """Some of the runs that a sweep started have failed."""
    MISTAKE = 2
    """Something that a user can mend, told in one line."""
    REFUSED = 3
    INTERRUPTED = 130
