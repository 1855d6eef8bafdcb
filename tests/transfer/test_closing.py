"""The last words of a sweep."""

import math

from megatron_patch.runs.trial import Trial
from megatron_patch.transfer.closing import closing


def curve(width: int, exponents: range, best: float, **settings: object) -> list[Trial]:
    """Trials on a parabola, nats over octaves."""
    return [Trial(width, 2.0**e, 2 + (e - best) ** 2 / 16, **settings) for e in exponents]  # type: ignore[arg-type]


def test_every_curve_has_its_optimum_or_what_is_wrong_with_it() -> None:
    """The wide model has the lowest loss of all, at the edge of its grid: that is no optimum."""
    wide = [Trial(256, t.lr, t.loss - 1, rule="sqrt") for t in curve(256, range(-9, -4), best=-5.0)]
    lines = closing([*wide, *curve(32, range(-9, -4), best=-7.0)], "s.yaml", "runs/s")
    assert lines[0].startswith("width 32 (none, sqrt): best LR 0.007")
    assert ", expected loss 2.0000, from 5 runs" in lines[0]
    assert lines[1].startswith("width 256 (sqrt): no optimum: the best LR 0.03125 is the highest of the grid")
    assert "add 0.0625 and 0.125" in lines[1]
    assert lines[1].endswith("; lowest measured: 1.0000 at LR 0.03125")
    assert [line.strip() for line in lines[2:]] == [
        "next:",
        "megatron-patch sweep s.yaml --resume   # with what the lines above miss added to s.yaml",
        "megatron-patch transfer --sweep runs/s --target TARGET.yaml --output tuned.yaml   # TARGET.yaml: the wide one",
        "megatron-patch report runs/s --output runs/s/report.html",
    ]


def test_without_an_optimum_of_the_proxy_no_transfer_is_offered() -> None:
    lines = closing(curve(32, range(-9, -4), best=-3.0), "s.yaml", "runs/s")
    assert "no optimum" in lines[0]
    assert not any("transfer" in line for line in lines)
    assert any("sweep s.yaml --resume" in line for line in lines)


def test_with_all_optima_the_grid_is_not_extended() -> None:
    lines = closing(curve(32, range(-9, -4), best=-7.0), "a b.yaml", "runs/a b")
    assert [line.split("#")[0].strip() for line in lines[1:]] == [
        "next:",
        "megatron-patch transfer --sweep 'runs/a b' --target TARGET.yaml --output tuned.yaml",
        "megatron-patch report 'runs/a b' --output 'runs/a b/report.html'",
    ]


def test_curves_of_other_settings_have_lines_of_their_own() -> None:
    trials = [t for d in (0.1, 0.2) for t in curve(32, range(-9, -4), best=-7.0, weight_decay=d, steps=100)]
    first, second, *_ = closing(trials, "s.yaml", "runs/s")
    assert "base weight decay 0.1, 100 iterations): best LR" in first
    assert "base weight decay 0.2, 100 iterations): best LR" in second


def test_what_diverged_and_a_single_trial() -> None:
    lines = closing([Trial(32, 2.0**e, math.nan) for e in (-3, -2)], "s.yaml", "runs/s")
    assert "no optimum: 0 of the learning rates have a finite loss" in lines[0]
    assert closing([], "s.yaml", "runs/s") == []
    assert closing([Trial(32, 0.1, 2.0)], "s.yaml", "runs/s") == [
        "next:",
        "  megatron-patch report runs/s --output runs/s/report.html",
    ]
