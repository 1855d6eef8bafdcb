"""Changing values in a flat YAML file of flags; every byte that is not part of a change stays as it was."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import yaml

from megatron_patch.errors import ConfigError
from megatron_patch.files.yaml_flags import flag_name


@dataclass(frozen=True)
class Change:
    """A flag's new value and where it comes from."""

    value: bool | int | float | str
    source: str
    """Becomes the comment behind the value; one line."""


def yaml_value(value: bool | int | float | str) -> str:
    """Return a value as YAML 1.1 reads it back: floats need a dot, which `repr` leaves out of 1e-05.

    >>> yaml_value(1e-05), yaml_value(0.25), yaml_value("sqrt"), yaml_value("none: 1"), yaml_value(True)
    ('1.0e-05', '0.25', 'sqrt', '"none: 1"', 'true')
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        text = repr(value)
        return text.replace("e", ".0e") if "e" in text and "." not in text else text
    text = str(value)
    return text if yaml.safe_load(text) == value else json.dumps(text)


def edit(path: str, text: str, changes: Mapping[str, Change], title: str, remarks: Sequence[str] = ()) -> str:
    """Return `text` with `changes`: values replaced where they stand, new flags in a block at the end.

    A value that already is the wanted number stays as it is written. The comment goes between the value and a comment
    that is there.

    Args:
        path: of the file, for messages.
        text: a flat YAML mapping, as `load_yaml` accepts it.
        changes: by flag name with dashes.
        title: first line of the block of new flags.
        remarks: comments at the end, one line each.

    Raises:
        ConfigError: a flag is written in a way that cannot be edited in place: in braces, or as an alias.
    """
    root = yaml.compose(text, yaml.SafeLoader)
    before = yaml.safe_load(text) or {}
    if isinstance(root, yaml.MappingNode) and root.flow_style:
        raise ConfigError("--target", path, "one `flag-name: value` a line", "write it without braces")
    newline = "\r\n" if "\r\n" in text else "\n"
    missing = dict(changes)
    pieces: list[tuple[int, int, str]] = []
    for key, node in root.value if isinstance(root, yaml.MappingNode) else ():
        change = missing.pop(flag_name(str(key.value)), None)
        if change is None or _equal(before[_constructed(key, before)], change.value):
            continue
        start, end = node.start_mark.index, node.end_mark.index
        if start < key.end_mark.index:
            raise ConfigError(
                f"{path}: {key.value}",
                f"at line {key.start_mark.line + 1}",
                "a plain value, not an alias",
                "write the value itself",
            )
        if text[start:end].strip() == "":  # nothing behind the colon
            start = end = text.index(":", key.end_mark.index) + 1
        old = " ".join(text[start:end].split())
        blank = "" if start and text[start - 1] in " \t" else " "
        was = f", was {old}" if old else ""
        rest = text[end:].lstrip(" \t")[:1]
        line_end = "" if rest in ("\n", "\r", "#", "") and "\n" not in text[start:end] else newline
        pieces.append((start, end, f"{blank}{yaml_value(change.value)}  # {change.source}{was}{line_end}"))
    for start, end, new in sorted(pieces, reverse=True):
        text = text[:start] + new + text[end:]
    lines = [f"# {title}", *(f"{name}: {yaml_value(c.value)}  # {c.source}" for name, c in missing.items())]
    lines = (lines if missing else []) + [f"# {' '.join(remark.split())}" for remark in remarks]
    if lines:
        gap = "" if not text else newline if text.endswith("\n") else 2 * newline
        text += gap + newline.join(lines) + newline
    _check(path, text, before, changes)
    return text


def _constructed(key: yaml.Node, before: Mapping[object, object]) -> object:
    """The key as PyYAML makes it; flags are texts."""
    return str(key.value) if str(key.value) in before else yaml.SafeLoader("").construct_object(key)


def _equal(old: object, new: object) -> bool:
    if isinstance(new, (bool, str)) or isinstance(old, bool) or old is None:
        return type(old) is type(new) and old == new
    try:
        return float(str(old)) == float(new)  # type: ignore[arg-type]
    except ValueError:
        return False


def _check(path: str, text: str, before: Mapping[object, object], changes: Mapping[str, Change]) -> None:
    """Read the result back: exactly the changes may have changed."""
    try:
        after = {flag_name(str(key)): value for key, value in yaml.safe_load(text).items()}
    except (yaml.YAMLError, AttributeError) as error:
        after, detail = {}, " ".join(str(error).split())[:200]
    else:
        detail = "another flag would change with it"
    wanted = {flag_name(str(key)): value for key, value in before.items()}
    same = after.keys() == wanted.keys() | changes.keys() and all(
        _equal(after[name], changes[name].value) if name in changes else _alike(after[name], wanted[name])
        for name in after
    )
    if not same:
        raise ConfigError("--target", path, f"plain `flag-name: value` lines ({detail})", "simplify its YAML")


def _alike(a: object, b: object) -> bool:
    return a == b or (a != a and b != b)  # nan
