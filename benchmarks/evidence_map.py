"""Where a rule holds: tables of docs/evidence.md over all sweeps of the same rules and widths."""

from collections.abc import Iterator

from evidence import known, names, sweep_file, tokens_of

from megatron_patch.fit.curves import study
from megatron_patch.fit.report_card import Grade, report_card
from megatron_patch.runs.trial import Trial

MAP = (
    *("length_500", "length_1000", "transfer"),
    *("batch_8192", "batch_512", "batch_256", "length_8000"),
    "swept_1000",
)
"""Sweeps of the same rules over the same widths: other lengths, other batches, the other protocol."""
MAPPED = ("standard", "independent", "sqrt")
NARROW, WIDE = 32, 128


def signed(text: str) -> str:
    """Return numbers in a table with a minus sign of their own."""
    return text.replace("| -", "| −")


def mapped() -> Iterator[tuple[str, dict[str, Grade]]]:
    """Yield every sweep of `MAP` that has a shift, with the grades of its rules at the wide width."""
    for name in MAP:
        grades = report_card(study(trials)) if (trials := known(name)) else []
        if any(grade.shift for grade in grades):
            yield name, {grade.label: grade for grade in grades if grade.curve.hidden_size == WIDE}


def setting(name: str) -> list[str]:
    """Return steps, tokens a step, these over the wide width, and the protocol of a sweep."""
    flags = sweep_file(name).flags
    tokens = tokens_of(flags)
    protocol = "frozen" if flags.get("vector-lr") else "swept along"
    return [f"{int(flags['train-iters']):,}", f"{tokens:,}", f"{tokens / WIDE:g}", protocol]


def where_it_holds() -> list[str]:
    """Return shift and lost loss of every rule, a row for each sweep of `MAP`."""
    lines = [
        "| steps | tokens a step | over the wide width | embedding and gains | "
        + " | ".join(f"{rule}: shift | loss lost" for rule in MAPPED)
        + " |",
        "|" + "---|" * (4 + 2 * len(MAPPED)),
    ]
    for name, grades in mapped():
        cells = setting(name)
        for rule in MAPPED:
            cells += shift_and_loss(grades.get(rule))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def shift_and_loss(grade: Grade | None) -> list[str]:
    """Return two cells, empty where nothing was found."""
    if grade is None or grade.shift is None:
        return ["", ""]
    return [grade.shift.text, "" if grade.lost is None else f"{grade.lost:.4f}"]


def at_proxy_lr() -> list[str]:
    """Return the loss at the proxy's optimal LR of every rule, a row for each sweep of `MAP`, as lines of Markdown."""
    rules = (*MAPPED, "sqrt-decay")
    lines = [
        "| steps | tokens a step | embedding and gains | " + " | ".join(rules) + " |",
        "|" + "---|" * (3 + len(rules)),
    ]
    for name, grades in mapped():
        steps, tokens, _, protocol = setting(name)
        losses = [grades[rule].transferred if rule in grades else None for rule in rules]
        cells = [steps, tokens, protocol, *("" if loss is None else f"{loss:.4f}" for loss in losses)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def sweeps() -> list[str]:
    """Return what was trained, a row for each sweep, as lines of Markdown."""
    lines = [
        "| sweep | widths | steps | tokens a step | weight decay | runs | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in names():
        trials, file = known(name), sweep_file(name)
        assert isinstance(file.plan, tuple)
        tokens = tokens_of(file.flags)
        done = f"{len(trials)}" if len(trials) == len(file.plan) else f"{len(trials)} of {len(file.plan)}"
        lines.append(sweep_row(name, trials, f"{tokens:,}", done) if trials else f"| {name} | | | | | {done} | |")
    trials = known("resnet")
    return [*lines, sweep_row("resnet", trials, "64 images", f"{len(trials)}")]


def sweep_row(name: str, trials: tuple[Trial, ...], tokens: str, done: str) -> str:
    """Return a row of `sweeps`; the seeds are the most that any LR has, of each width where they differ."""
    widths = sorted({trial.hidden_size for trial in trials})
    seeds = [len({trial.seed for trial in trials if trial.hidden_size == width}) for width in widths]
    decays = sorted({trial.weight_decay for trial in trials if trial.weight_decay is not None})
    cells = [
        f"[{name}](evidence/{name}/trials.csv)",
        ", ".join(map(str, widths)),
        f"{trials[0].steps:,}",
        tokens,
        f"{decays[0]:g}" if len(decays) == 1 else f"{decays[0]:g} to {decays[-1]:g}",
        done,
        ", ".join(map(str, seeds)) if len(set(seeds)) > 1 else str(seeds[0]),
    ]
    return f"| {' | '.join(cells)} |"
