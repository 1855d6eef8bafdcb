"""The proxy's fan-ins: read from a model of its width, or given by name."""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from megatron_patch.errors import ConfigError
from megatron_patch.plain.modules import Class, Classified, classify


def base_fan_ins(
    parameters: Sequence[Classified],
    base: nn.Module | Mapping[str, float],
    classes: Mapping[str, Class] | None,
) -> dict[str, float]:
    """Return the base model's fan-in of every matrix and output weight, by name.

    Args:
        parameters: of the model to train.
        base: a model of the proxy's width, best on the meta device; or fan-ins by parameter or module name, or by
            pattern, where ``*`` stands for anything: the name first, then the first pattern that matches.
        classes: what a user said of parameters of modules that are not known; here for those of `base`.

    Raises:
        ConfigError: a weight without a counterpart, or with several that differ; a name or pattern of no use.
    """
    scaled = [p for p in parameters if p.role in ("matrix", "output")]
    return _of_model(scaled, base, classes) if isinstance(base, nn.Module) else _of_mapping(scaled, base)


def _numberless(name: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _of_model(scaled: Sequence[Classified], base: nn.Module, classes: Mapping[str, Class] | None) -> dict[str, float]:
    """By the same name; a deeper model's further layers by the name without numbers, where all of the base agree."""
    theirs = classify(base, None, classes, all_used=False)  # it may have fewer layers
    exact = {p.name: p.fan_in for p in theirs if p.role != "vector"}
    alike: dict[str, set[int]] = {}
    for name, fan_in in exact.items():
        alike.setdefault(_numberless(name), set()).add(fan_in)
    found: dict[str, float] = {}
    for p in scaled:
        candidates = {exact[p.name]} if p.name in exact else alike.get(_numberless(p.name), set())
        if len(candidates) != 1:
            what = f"fan-ins {sorted(candidates)} of its likes" if candidates else "no such parameter"
            raise ConfigError(
                "base",
                f"has {what} for {p.name}",
                "one fan-in for every weight of the model",
                "build the proxy with the same module names, or give base as a mapping from names to fan-ins",
            )
        found[p.name] = float(min(candidates))
    return found


def _of_mapping(scaled: Sequence[Classified], base: Mapping[str, float]) -> dict[str, float]:
    for key, value in base.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise ConfigError(f"base[{key!r}]", value, "a positive number, the proxy's fan-in", "correct it")
    unused = set(base)
    found: dict[str, float] = {}
    for p in scaled:
        names = (p.name, p.name.removesuffix(".weight"))
        keys = [key for key in base if key in names] or [k for k in base if any(fnmatchcase(n, k) for n in names)]
        if not keys:
            raise ConfigError(
                "base",
                f"has nothing for {p.name}",
                "a fan-in for every weight that the rule scales",
                "give the proxy's for this name, or for a pattern that matches it",
            )
        unused.discard(keys[0])
        found[p.name] = float(base[keys[0]])
    for key in sorted(unused):
        raise ConfigError(
            f"base[{key!r}]",
            base[key],
            "a name or pattern of a weight that the rule scales, and that no earlier pattern matches",
            "drop it, correct it, or put it before wider patterns",
        )
    return found
