"""The sizes of the proxy: those that are left to Megatron, those that no layer uses, and those that look odd."""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from megatron_patch.config import BASE_DIMENSIONS, WidthConfig, flag
from megatron_patch.config.sizes import SIZE_FLAGS, chosen_by_megatron
from megatron_patch.errors import ConfigError, UpstreamChanged
from megatron_patch.upstream.width.parameters import NamedParameter


def sizes_left_out(args: Any, command_line: Sequence[str], default_of: Callable[[str], Any]) -> tuple[str, ...]:
    """Return which sizes nobody has given.

    Args:
        args: Megatron's namespace before its validation, which fills them in.
        command_line: what it was parsed from. A script or a checkpoint may have set more.
        default_of: Megatron's parser's default of an argument.
    """
    given = {word.partition("=")[0] for word in command_line}
    return tuple(
        name
        for name in SIZE_FLAGS
        if hasattr(args, name) and flag(name) not in given and getattr(args, name) in (None, default_of(name))
    )


def settle_bases(args: Any, left_out: Collection[str]) -> list[str]:
    """Set the ``--base-...`` flags that the user has not given where Megatron would not keep the hidden sizes' ratio.

    They are set in `args`, so that checkpoints and run.json keep them.

    Args:
        args: Megatron's namespace after its validation; changed.
        left_out: what `sizes_left_out` returned.

    Returns:
        What was set, a line for the user each.

    Raises:
        ConfigError: Megatron would give the proxy a layer of no width.
        UpstreamChanged: this Megatron chooses its sizes in another way.
    """
    base = getattr(args, "base_hidden_size", None)
    if base is None or args.width_scaling == "none" or not left_out:
        return []
    hidden = args.hidden_size
    own = chosen_by_megatron(vars(args), left_out, hidden, args.ffn_hidden_size)
    proxys = chosen_by_megatron(vars(args), left_out, base, args.base_ffn_hidden_size)
    lines = []
    for name, size in own.items():
        live = getattr(args, name, size)
        if live != size:
            raise UpstreamChanged(
                f"without {flag(name)} this Megatron gives a model of hidden size {hidden} {live}, not {size} as 0.19 "
                f"does; give {flag(f'base_{name}')}"
            )
        proxy = proxys.get(name)
        if proxy is None or getattr(args, f"base_{name}") is not None or proxy * hidden == size * base:
            continue
        if proxy < 1:
            raise ConfigError(
                "--base-hidden-size",
                base,
                f"a proxy with a {name}: without {flag(name)} Megatron makes it {proxy} at this hidden size",
                f"give {flag(f'base_{name}')}",
            )
        setattr(args, f"base_{name}", proxy)
        how = "as wide as the MLP" if name == "moe_ffn_hidden_size" else f"of hidden size {base}"
        lines.append(
            f"{flag(f'base_{name}')} {proxy}: {flag(name)} is left to Megatron, which chooses {size} here and {proxy} "
            f"for a proxy {how}"
        )
    return lines


def check_bases_used(width: WidthConfig, used: Collection[str]) -> None:
    """Make sure that every ``--base-...`` flag is the base of some layer's fan-in.

    Args:
        width: the flags.
        used: what some weight of the whole model reads, see `dimensions_read`.

    Raises:
        ConfigError: a flag that no layer uses, so that its user believes in what does not happen.
    """
    for name, size in width.base_dimensions.items():
        # The experts' width follows the MLP's where it is left to Megatron, in models without any MLP, too.
        followed = name == "ffn_hidden_size" and "moe_ffn_hidden_size" in used
        followed = followed and width.base_dimensions.get("moe_ffn_hidden_size") == size
        if name not in used and not followed:
            raise ConfigError(
                flag(f"base_{name}"),
                size,
                f"a model with a layer that has it ({BASE_DIMENSIONS[name]})",
                "drop the flag for this model",
            )


def cautions(width: WidthConfig, parameters: Iterable[NamedParameter]) -> list[str]:
    """Return what a user should know of the width multipliers, a line each: what was assumed, and what looks odd."""
    if width.rule == "none":
        return []
    lines, fractions, narrower = [], {}, {}
    for p in parameters:
        spec = p.spec
        if p.assumed:
            lines.append(
                f"{spec.name} is no layer megatron_patch knows; m = {spec.m:g}, the ratio of the hidden sizes, is "
                "assumed"
            )
        elif spec.dimension and spec.base_fan_in != round(spec.base_fan_in):
            fractions[spec.dimension] = spec
        if spec.m < 1:
            narrower[spec.dimension or spec.name] = spec
    for dimension, spec in sorted(fractions.items()):
        lines.append(
            f"no {flag(f'base_{dimension}')}: by the ratio of the hidden sizes the proxy's is {spec.base_fan_in:.6g} "
            f"to the {spec.fan_in} here, which is no whole number; give the proxy's, or m = {spec.m:g} may be wrong"
        )
    for dimension, spec in sorted(narrower.items()):
        lines.append(
            f"m = {spec.m:g} for {dimension}: {spec.fan_in} is less than the base's {spec.base_fan_in:g}, and the rule "
            "scales down in width; were proxy and target swapped?"
        )
    return lines
