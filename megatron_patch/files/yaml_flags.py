"""YAML files that users write: read safely, each key once, every mistake one line. A flat one holds flags."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from megatron_patch.errors import ConfigError

FLAG_NAME = re.compile(r"[A-Za-z][^\s=]*")


def flag_name(text: str) -> str:
    """``--num_layers`` -> ``num-layers``."""
    return text.removeprefix("--").replace("_", "-")


def attributes(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return flags by the names that argparse gives their values: ``num-layers`` -> ``num_layers``."""
    return {name.replace("-", "_"): value for name, value in flags.items()}


def load_yaml(path: str, flag: str = "--config") -> dict[str, Any]:
    """Return the flags in a YAML file, with dashes or underscores in the names and without a leading ``--``.

    Args:
        path: the file.
        flag: what named the file, for messages.

    Raises:
        ConfigError: the file cannot be read, is no YAML, or is no flat mapping with each flag once.
    """
    content = read_mapping(path, flag, "write one `flag-name: value` a line", "flag", flag_name)
    flags: dict[str, Any] = {}
    for key, value in content.items():
        name = flag_name(str(key))
        if not isinstance(key, str) or not FLAG_NAME.fullmatch(name):
            raise ConfigError(f"{path}: {key}", value, "the name of a flag before the colon", "correct or quote it")
        if not is_flag_value(value):
            raise ConfigError(
                f"{path}: {key}", value, "a value or a list of values", "write the flags flat, as on a command line"
            )
        flags[name] = value
    return flags


def is_flag_value(value: object) -> bool:
    """Return whether a flag can have it: a plain value, or a list of plain values."""
    plain = not isinstance(value, (dict, set))
    return plain and not (isinstance(value, list) and any(isinstance(v, (dict, set, list, tuple)) for v in value))


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that a mapping has twice, of which PyYAML alone keeps the last without a word.

    Args:
        text: of the file.
        path: the file, for messages.
        what: what a key is called in messages.
        name: the key as typed -> what it names.
    """

    def __init__(self, text: str, path: str, what: str, name: Callable[[str], str]) -> None:
        super().__init__(text)
        self._path, self._what, self._name = path, what, name

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key_node, _ in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            name = self._name(key)
            if name in lines:
                expected = f"each {self._what} once, and line {lines[name]} has it"
                raise ConfigError(f"{self._path}: {key}", f"at line {line}", expected, "delete one")
            lines[name] = line
        return node


def read_mapping(
    path: str, flag: str, fix: str, what: str = "key", name: Callable[[str], str] = str
) -> Mapping[Any, Any]:
    """Return the mapping in a YAML file; an empty one for an empty file.

    Args:
        path: the file.
        flag: what named the file, for messages.
        fix: what to do about a file that holds something else than a mapping.
        what: what a key is called in messages.
        name: the key as typed -> what it names; no mapping of the file may name one thing twice.

    Raises:
        ConfigError: the file cannot be read, is no YAML, holds something else, or has a key twice.
    """
    try:
        with open(path, encoding="utf-8") as file:
            loader = _UniqueKeys(file.read(), path, what, name)
        try:
            content = loader.get_single_data()
        finally:
            loader.dispose()
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(flag, path, "a readable file", f"check the path ({error.strerror})") from None
    except Exception as error:  # not UTF-8, no YAML, or what PyYAML's constructors raise at 2001-02-30 and !!int ''
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        raise ConfigError(flag, path, f"valid YAML{line}", f"correct it: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(flag, path, "a mapping of flag names to values", fix)
    return content
