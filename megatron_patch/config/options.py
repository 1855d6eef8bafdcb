"""A flag as a field of a dataclass: its name, type, choices, default and help, each written once."""

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, get_args

from megatron_patch.errors import ConfigError

_SHOULD_BE = {int: "an integer", float: "a number", str: "one value", bool: "true or false"}


def flag(name: str) -> str:
    """Return the command-line spelling of a setting: ``"q_lora_rank"`` -> ``"--q-lora-rank"``."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True)
class Option:
    """One flag."""

    name: str
    """Attribute of Megatron's namespace, and key in run.json."""
    kind: type
    """Of its value; bool is a flag that takes none."""
    default: Any
    help: str
    choices: tuple[str, ...] | None = None

    @property
    def flag(self) -> str:
        """As it is typed."""
        return flag(self.name)

    def read(self, arguments: Mapping[str, Any]) -> Any:
        """Return the value among `arguments`, converted as the command line would; the default where it is not given.

        Raises:
            ConfigError: a value of another type.
        """
        value = arguments.get(self.name)
        if value is None:
            return self.default
        try:
            if isinstance(value, bool) != (self.kind is bool) or isinstance(value, (dict, list)):
                raise ValueError
            return value if isinstance(value, self.kind) else self.kind(str(value))
        except ValueError:
            raise ConfigError(self.flag, value, _SHOULD_BE[self.kind], "correct the value") from None


def option(default: Any, help: str, *, name: str | None = None, choices: tuple[str, ...] | None = None) -> Any:
    """Declare a field of a dataclass to be a flag.

    Args:
        default: of the field; False for a flag that takes no value, True for one that switches off: ``no_...``.
        help: what ``--help`` says.
        name: of the flag, with underscores, where it is not the field's.
        choices: the values it may have.
    """
    return field(default=default, metadata={"help": help, "name": name, "choices": choices})


def options(prefix: str, helps: Mapping[str, str]) -> Any:
    """Declare a field of a dataclass to be several flags for integers, kept as a mapping of those that are given.

    Args:
        prefix: what the flags' names begin with before the keys of the mapping.
        helps: what ``--help`` says, by key.
    """
    return field(default_factory=dict, metadata={"prefix": prefix, "helps": helps})


_WHOLE = ""
"""The key of a field's only flag."""


def _declared(f: Field[Any]) -> dict[str, Option]:
    """Return the flags of a field, by the key of each one's value in it."""
    about = f.metadata
    if "helps" in about:
        return {key: Option(about["prefix"] + key, int, None, text) for key, text in about["helps"].items()}
    if "help" not in about:
        return {}
    kind: Any = next(iter(get_args(f.type)), f.type)  # int of `int | None`
    default = False if kind is bool else f.default
    return {_WHOLE: Option(about["name"] or f.name, kind, default, about["help"], about["choices"])}


def options_of(settings: type) -> tuple[Option, ...]:
    """Return the flags of a dataclass in the order of its fields."""
    return tuple(one for f in fields(settings) for one in _declared(f).values())


def read(settings: type, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of the fields of a dataclass that are flags.

    Args:
        settings: the dataclass.
        arguments: by attribute name; what is absent or None has its default.

    Raises:
        ConfigError: a value of another type.
    """
    values: dict[str, Any] = {}
    for f in fields(settings):
        found = {key: one.read(arguments) for key, one in _declared(f).items()}
        if _WHOLE in found:
            values[f.name] = not found[_WHOLE] if f.default is True else found[_WHOLE]
        elif found:
            values[f.name] = {key: value for key, value in found.items() if value is not None}
    return values


def check_choices(settings: Any) -> None:
    """Raise ConfigError on the first field of a dataclass's instance that is none of the choices of its flag."""
    for f in fields(settings):
        one, value = _declared(f).get(_WHOLE), getattr(settings, f.name)
        if one and one.choices is not None and value not in one.choices:
            raise ConfigError(one.flag, value, f"one of {', '.join(one.choices)}", "choose one of them")
