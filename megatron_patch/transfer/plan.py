"""From a proxy's sweep to a target's config: which flags change, to what, and why; see docs/transfer-config.md."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_patch.config import BASE_DIMENSIONS, WIDTH_RULES, Settings
from megatron_patch.errors import ConfigError
from megatron_patch.files.yaml_flags import attributes
from megatron_patch.fit.blowups import described
from megatron_patch.fit.found import NoOptimum, Optimum, Ridge
from megatron_patch.fit.optimum import fit_lr, fit_lr_weight_decay
from megatron_patch.runs.trial import Trial
from megatron_patch.transfer.beyond import beyond_width
from megatron_patch.transfer.checks import Training, differences
from megatron_patch.transfer.options import Options
from megatron_patch.transfer.yaml_edit import Change

DIGITS = 6
"""Significant digits of what is written: far finer than any interval, and the JSON and the YAML say the same."""
DEFAULT_RULE = "independent"
"""Where nothing names a rule: LR * weight decay, which sets the relative updates of most of a long training, stays what
the proxy was tuned to at every width (arXiv 2510.19093, section 5). Never without a warning."""


@dataclass(frozen=True)
class Conversion:
    """What the target's config will be changed to."""

    lr: float
    """The proxy's optimal base LR."""
    interval: tuple[float | None, float | None]
    """An end is None where it is open: beyond the edge of the grid, or without a bound by the fit."""
    spread: str
    """The interval in words."""
    weight_decay: float
    base_hidden_size: int
    rule: str
    loss: float
    found: Optimum | Ridge
    changes: Mapping[str, Change]
    warnings: tuple[str, ...]
    forced: tuple[str, ...]
    """Why this would have been refused without ``--force``."""
    flags: Mapping[str, Any]
    """Of the target, after the changes."""

    def as_json(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return {
            "lr": self.lr,
            "lr_interval": list(self.interval),
            "weight_decay": self.weight_decay,
            "base_hidden_size": self.base_hidden_size,
            "rule": self.rule,
            "expected_loss": self.loss,
            "warnings": list(self.warnings),
        }


class Refused(NoOptimum):
    """A transfer that would be a guess; ``--force`` goes on."""


def plan_conversion(
    trials: Sequence[Trial], target: Mapping[str, Any], options: Options, proxy: Mapping[str, Any] | None = None
) -> Conversion:
    """Fit the proxy's optimum and plan the changes to the target.

    Args:
        trials: the sweep; may hold other widths, rules and horizons.
        target: flags of the target's config.
        options: of the command line.
        proxy: flags of the proxy's config, for sweeps that do not record them.

    Raises:
        ConfigError: a missing or contradictory setting.
        NoOptimum: the sweep does not tell the optimum, or proxy and target differ in what no rule covers, with all
            reasons at once; with `options.force` only if there is not even a best point.
    """
    if not trials:
        raise ConfigError("--sweep", "", "at least one run", "check the folder or the CSV file")
    target_width = _size(target, "hidden-size")
    warnings: list[str] = []
    width = _proxy_width(trials, target, options, warnings)
    rule, rule_source = _rule(trials, target, options, warnings)
    chosen = _chosen(trials, width, rule, options)
    base, here = Training.of_proxy(chosen, proxy), Training.of_flags(target)
    lr_factor, vector_factor, decay_factor, covered, notes = beyond_width(base, here, options, warnings)
    problems = [d for d in differences(base, here) if d.name not in covered]
    warnings += [f"{d.text}; {d.fix}" for d in problems if not d.refuses]
    found, open_questions = _optimum(chosen, warnings)
    open_questions += [NoOptimum(d.text, d.fix) for d in problems if d.refuses]
    if found is None:
        raise _together(open_questions)
    lr, (low, high) = _round(found.lr), (_power(found.low), _power(found.high))
    weight_decay, decay_source = _weight_decay(found, chosen, target, proxy, options)
    where = "the sweep's optimum" if not math.isnan(getattr(found, "curvature", 0.0)) else "the sweep's best point"
    spread = f"{'its neighbours' if where.endswith('point') else '90% interval'} {_shown(low)} to {_shown(high)}"
    changes = {"lr": Change(_round(lr * lr_factor), f"{where} at width {width}, {spread}{notes['lr']}")}
    vector_lr = found.used[0].vector_lr
    if vector_lr is not None or "vector-lr" in target or vector_factor != lr_factor:
        source = "the sweep's vector LR" if vector_lr is not None else "the sweep had one LR for all"
        changes["vector-lr"] = Change(_round((vector_lr or lr) * vector_factor), source + notes["vector-lr"])
    changes["weight-decay"] = Change(_round(weight_decay * decay_factor), decay_source + notes["weight-decay"])
    changes["width-scaling"] = Change(rule, rule_source)
    if rule != "none":
        changes["base-hidden-size"] = Change(width, "the proxy's hidden size")
        changes |= _other_bases(found.used, target, proxy, width)
    elif target_width != width:
        warnings.append(f"the rule none does not adapt LR and weight decay from width {width} to {target_width}")
    changes |= _warmup(target, rule, target_width / width, options, warnings)
    flags = {**target, **{name: change.value for name, change in changes.items()}}
    _validate(flags)
    if open_questions and not options.force:
        raise _together(open_questions)
    forced = tuple(str(question) for question in open_questions)
    warnings += [f"forced: {text}" for text in forced]
    return Conversion(
        lr,
        (low, high),
        spread,
        _round(weight_decay),
        width,
        rule,
        found.loss,
        found,
        changes,
        tuple(warnings),
        forced,
        flags,
    )


def _together(questions: Sequence[NoOptimum]) -> NoOptimum:
    """Return one refusal for all reasons: who mends them one by one would train in vain in between."""
    if len(questions) == 1:
        return questions[0]
    return Refused("; ".join(q.reason for q in questions), "; ".join(dict.fromkeys(q.fix for q in questions)))


def _size(flags: Mapping[str, Any], name: str) -> int:
    value = flags.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"--target: {name}", value, "a positive integer", f"add {name} to the target's config")
    return value


def _proxy_width(trials: Sequence[Trial], target: Mapping[str, Any], options: Options, warnings: list[str]) -> int:
    widths = sorted({t.hidden_size for t in trials})
    width = options.base_hidden_size or widths[0]
    if width not in widths:
        raise ConfigError(
            "--base-hidden-size", width, f"a width of the sweep: {', '.join(map(str, widths))}", "give one of them"
        )
    if len(widths) > 1:
        how = "chosen by --base-hidden-size" if options.base_hidden_size else "the smallest; --base-hidden-size chooses"
        warnings.append(f"the sweep has widths {', '.join(map(str, widths))}: the proxy is {width} ({how})")
    before = target.get("base-hidden-size")
    if before is not None and before != width:
        warnings.append(f"the target's base-hidden-size was {before}; the proxy of this sweep has {width}")
    return width


def _rule(trials: Sequence[Trial], target: Mapping[str, Any], options: Options, warnings: list[str]) -> tuple[str, str]:
    for value, source in ((options.rule, "--rule"), (target.get("width-scaling"), "the target's own rule")):
        if value is not None:
            if value not in WIDTH_RULES:
                flag = "--rule" if source == "--rule" else "--target: width-scaling"
                raise ConfigError(flag, value, f"one of {', '.join(WIDTH_RULES)}", "choose one of them")
            return str(value), f"from {source}"
    rules = sorted({t.rule for t in trials} - {"none"})
    if len(rules) == 1:
        return rules[0], "the one scaling rule of the sweep"
    if rules:
        raise ConfigError(
            "--rule",
            None,
            f"one of the sweep's rules: {', '.join(rules)}",
            "choose one, or give width-scaling in the target",
        )
    warnings.append(
        f"neither --rule nor the target nor the sweep names a width rule: {DEFAULT_RULE} is written, which keeps LR * "
        "weight decay at every width (arXiv 2510.19093, eq. 8) and costs loss in short runs; give --rule to choose"
    )
    return DEFAULT_RULE, "chosen for lack of a rule in --rule, target and sweep: keeps LR * weight decay, check it"


def _chosen(trials: Sequence[Trial], width: int, rule: str, options: Options) -> list[Trial]:
    """The trials that the optimum is fitted to: of one width, rule, vector LR, length, and weight decay if given."""
    chosen = [t for t in trials if t.hidden_size == width]
    rules = {t.rule for t in chosen}
    if len(rules) > 1:
        wanted = rule if rule in rules else "none"
        if wanted not in rules:
            raise ConfigError("--rule", rule, f"a rule of the proxy's runs: {', '.join(sorted(rules))}", "choose one")
        chosen = [t for t in chosen if t.rule == wanted]
    for name, flag, wanted_value in (
        ("vector_lr", "--vector-lr", options.vector_lr),
        ("steps", "--steps", options.steps),
        ("weight_decay", "--weight-decay", options.weight_decay),
    ):
        values = {getattr(t, name) for t in chosen}
        known = sorted(v for v in values if v is not None)
        if wanted_value is not None and known:
            match = [v for v in known if math.isclose(v, wanted_value, rel_tol=1e-6)]
            if not match:
                listed = ", ".join(f"{v:g}" for v in known)
                raise ConfigError(flag, wanted_value, f"a value of the sweep: {listed}", "give one of them")
            chosen = [t for t in chosen if getattr(t, name) == match[0]]
        elif len(values) > 1 and name != "weight_decay":
            listed = ", ".join([f"{v:g}" for v in known] + ["none"] * (None in values))
            raise ConfigError(flag, None, f"a choice, since the sweep has {listed}", f"give {flag}")
        elif known and None in values:
            raise ConfigError("--sweep", "", f"a {name} for every run or for none", "complete the column")
    return chosen


def _optimum(chosen: Sequence[Trial], warnings: list[str]) -> tuple[Optimum | Ridge | None, list[NoOptimum]]:
    """Return the optimum or the best guess at it, if there is one, and why it is no more than that."""
    decays = {t.weight_decay for t in chosen}
    found: Optimum | Ridge | None
    refusals = []
    try:
        found = fit_lr(chosen) if len(decays) == 1 else fit_lr_weight_decay(chosen)
    except NoOptimum as error:
        found = error.partial
        refusals.append(error)
    if found is not None:
        _warn_of_fit(found, chosen, warnings)
    return found, refusals


def _warn_of_fit(found: Optimum | Ridge, chosen: Sequence[Trial], warnings: list[str]) -> None:
    """Add what was left out of a fit, and what it does not tell."""
    diverged = sorted({t.lr for t in chosen if t.diverged})
    if diverged:
        warnings.append(
            f"{sum(t.diverged for t in chosen)} runs diverged, at LR {', '.join(f'{v:.4g}' for v in diverged)}"
        )
    if found.blown:
        warnings.append(f"{len(found.blown)} runs count as diverged, as they blew up: {described(found.blown)}")
    for t in found.dropped:
        at = f"LR {t.lr:.4g}" + (f", weight decay {t.weight_decay:.4g}" if isinstance(found, Ridge) else "")
        warnings.append(f"left out as an outlier: loss {t.loss:.5g} at {at}" + (f" ({t.source})" if t.source else ""))
    if isinstance(found, Ridge):
        if zero := sum(t.weight_decay == 0 for t in chosen):
            warnings.append(f"{zero} runs without weight decay were left out: they have no place on a logarithmic axis")
        if found.is_ridge:
            a, b = found.direction
            warnings.append(
                f"the optimum lies on a ridge: along (log2 LR, log2 weight decay) = ({a:.2f}, {b:.2f}) the loss is "
                f"{found.across / max(found.along, 1e-12):.3g} times flatter than across"
            )
    elif len({t.lr for t in found.used}) == len(found.used) == 3 and not math.isnan(found.curvature):
        warnings.append("3 runs do not tell how noisy they are: the interval is the LRs on both sides of the best")


def _weight_decay(
    found: Optimum | Ridge,
    chosen: Sequence[Trial],
    target: Mapping[str, Any],
    proxy: Mapping[str, Any] | None,
    options: Options,
) -> tuple[float, str]:
    if isinstance(found, Ridge):
        low, high = _power(found.weight_decay_low), _power(found.weight_decay_high)
        return _round(found.weight_decay), f"the sweep's optimum, 90% interval {_shown(low)} to {_shown(high)}"
    decays = {t.weight_decay for t in found.used}
    if (value := next(iter(decays))) is not None:
        if len(decays) > 1:  # a forced best point of a surface
            value = min(found.used, key=lambda t: t.loss).weight_decay or 0.0
        return value, "the sweep's weight decay"
    for given, source in (
        (options.weight_decay, "from --weight-decay"),
        ((proxy or {}).get("weight-decay"), "from the proxy's config"),
        (target.get("weight-decay"), "the target's own: the sweep has none"),
    ):
        if given is not None:
            try:
                return float(given), source
            except (TypeError, ValueError):
                raise ConfigError("--target: weight-decay", given, "a number", "correct it") from None
    raise ConfigError(
        "--weight-decay",
        None,
        "the weight decay of the sweep, which neither it nor the target's config has",
        "give --weight-decay, or add a column weight_decay",
    )


def _other_bases(
    used: Sequence[Trial], target: Mapping[str, Any], proxy: Mapping[str, Any] | None, width: int
) -> dict[str, Change]:
    """The proxy's other fan-ins, where they are known."""
    known, own = Training.of_proxy(used, proxy).values, Training.of_flags(target).values
    changes = {}
    for name in BASE_DIMENSIONS:
        key = "base-" + name.replace("_", "-")
        value = known.get(name)
        dense = name != "ffn_hidden_size" or not target.get("num-experts")
        asked = key in target or own.get(name) is not None
        if isinstance(value, int) and asked and (dense or key in target):
            changes[key] = Change(value, f"the proxy's: {BASE_DIMENSIONS[name].partition(',')[0]}")
        elif key in target and target.get("base-hidden-size") != width:
            raise ConfigError(
                f"--target: {key}",
                target[key],
                f"the size of a proxy of width {width}, which the sweep does not record",
                f"give --proxy PROXY.yaml, or correct {key} and base-hidden-size in the target",
            )
    return changes


def _warmup(target: Mapping[str, Any], rule: str, m: float, options: Options, warnings: list[str]) -> dict[str, Change]:
    changes = {}
    if options.extra_warmup is not None:
        changes["extra-warmup"] = Change(options.extra_warmup, "from --extra-warmup")
    if options.extra_warmup_fraction is not None:
        changes["extra-warmup-fraction"] = Change(options.extra_warmup_fraction, "from --extra-warmup-fraction")
    kind = options.extra_warmup or target.get("extra-warmup", "none")
    if rule == "sqrt" and m > 1 and kind == "none":
        warnings.append(
            "the rule sqrt keeps the proxy's relative updates from the first step on, and a wide model wants them "
            "smaller at first: add --extra-warmup exp --extra-warmup-fraction 0.25 (arXiv 2510.19093, eq. 14)"
        )
    return changes


def _validate(flags: Mapping[str, Any]) -> None:
    """Check our flags against each other as a run does, but for the metrics folder, which may be named only then."""
    settings = Settings.of(attributes(flags))
    metrics = replace(settings.metrics, directory=settings.metrics.directory or os.devnull)
    replace(settings, metrics=metrics).validate(flags["hidden-size"])


def _round(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _power(log2: float) -> float | None:
    return _round(2.0**log2) if math.isfinite(log2) else None


def _shown(value: float | None) -> str:
    """Return an end of an interval; an open one is at the edge of the grid or without a bound by the fit."""
    return "(open)" if value is None else f"{value:.4g}"
