"""The part of a report that is about a sweep: what is read and drawn, how it works in a browser, how large it is."""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_patch.entry.run import leave_report
from megatron_patch.fit.curves import study
from megatron_patch.report.charts_sweep import heat_maps
from megatron_patch.report.charts_widths import comparison_galleries, comparisons
from megatron_patch.report.drawing import small_figure
from megatron_patch.report.page import html_page, write_report
from megatron_patch.report.svg import svg
from megatron_patch.report.sweep_section import read_all, sweep
from megatron_patch.runs.trial import Trial, to_csv
from tests.support.browser import inspect, needs_chromium
from tests.support.parabolas import BEND, PROXIES, PROXY, curve
from tests.support.report_page import Page, number, values_of
from tests.support.run_folders import write_record, write_run

Tool = Callable[..., int]
SQRT = curve("sqrt", 128, PROXY)
STANDARD = curve("standard", 128, PROXY + 1.5)


def write_trial(folder: Path, template: Path, trial: Trial, **content: Any) -> None:
    """Write the run of a trial to `folder`, with everything that was measured in `template`."""
    shutil.copytree(template, folder)
    arguments = {"hidden_size": trial.hidden_size, "lr": trial.lr, "weight_decay": 0.1, "seed": 1}
    arguments |= {"width_scaling": trial.rule, "base_hidden_size": None if trial.rule == "none" else 32}
    losses = {"final_loss": trial.loss, "evaluations": [{"iteration": 40, "set": "validation", "lm loss": trial.loss}]}
    write_record(folder / "transfer", losses | content, **arguments)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything."""
    return write_run(tmp_path_factory.mktemp("runs") / "template")


@pytest.fixture(scope="module")
def swept(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a sweep: trials of three rules, a table that has one more, and a trial that failed."""
    output = tmp_path_factory.mktemp("sweep")
    lost = SQRT[0]
    for place, trial in enumerate([*PROXIES, *SQRT[1:], *STANDARD]):
        write_trial(output / "trials" / f"t{place:02d}", template, trial)
    write_trial(output / "trials" / "failed", template, SQRT[0], status="failed")
    named = [dataclasses.replace(t, weight_decay=0.1, seed=1, steps=40) for t in (lost, *PROXIES)]
    (output / "trials.csv").write_text(to_csv(named))
    (output / "sweep.yaml").write_text("")
    return output


@pytest.fixture(scope="module")
def page(swept: Path) -> str:
    """The page of the sweep."""
    runs, found, notes = read_all([str(swept)])
    return html_page(runs, found, notes)


def test_runs_and_the_table_of_a_sweep_make_its_trials(swept: Path) -> None:
    runs, found, notes = read_all([str(swept)])
    assert found is not None
    trials = found.study.trials
    assert len(runs) == len(PROXIES) + len(SQRT) + len(STANDARD)  # the failed one has a folder
    assert sorted((t.rule, t.lr, t.loss) for t in trials) == sorted(
        (t.rule, t.lr, t.loss) for t in (*PROXIES, *SQRT, *STANDARD)
    )
    (note,) = notes
    assert "failed is no trial of the sweep" in note and "status failed" in note


def test_the_card_on_the_page_holds_the_numbers(page: str) -> None:
    rows = {row["rule"][0]: row for row in Page(page).table("rule", "width", "shift, octaves")}
    assert set(rows) == {"sqrt", "standard (control)"}
    row = rows["standard (control)"]
    assert float(row["shift, octaves"][1] or "") == pytest.approx(1.5, abs=0.01)
    assert row["shift, octaves"][0].startswith("+1.5")
    assert row["loss lost by transfer"][0].startswith("+0.11")
    assert float(row["loss lost by transfer"][1] or "") == pytest.approx(BEND / 2 * 1.5**2, abs=0.007)
    assert number(row["best loss"]) == pytest.approx(3.0, abs=1e-3)
    text = Page(page).text
    assert "under sqrt cannot be told apart from the proxy's" in text
    assert "so sqrt, standard share one proxy curve" in text


def test_a_table_alone_makes_a_page_and_a_picture(tmp_path: Path, tool: Tool, capsys: Any) -> None:
    diverged = dataclasses.replace(STANDARD[-1], loss=math.nan)
    (tmp_path / "t.csv").write_text(to_csv([*PROXIES, *SQRT, *STANDARD[:-1], diverged]))
    assert tool("report", tmp_path / "t.csv", "--output", tmp_path / "r.html") == 0
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    found = Page((tmp_path / "r.html").read_text())
    rows = found.table("rule", "width", "base LR", "validation loss")
    assert [number(row["base LR"]) for row in rows] == [t.lr for t in (*PROXIES, *SQRT, *STANDARD)]
    assert rows[-1]["validation loss"] == ("diverged", "Infinity")
    printed = capsys.readouterr().out
    assert "transfer report card" in printed
    assert "cannot be told apart from the proxy's" in printed


def test_refusals_are_on_the_page_beside_the_curve(tmp_path: Path) -> None:
    found = sweep([*PROXIES, *curve("none", 128, -12.0)])
    text = Page(html_page((), found)).text
    assert text.count("is the lowest of the grid") == 2  # the card and the picture
    assert "no rule has an optimum" not in text  # but controls only
    assert "nothing but controls was swept" in text


def test_a_heat_map_has_a_cell_for_every_pair_and_the_ridge() -> None:
    """Losses that depend on LR * weight decay much more than on their ratio."""

    def loss(x: float, y: float) -> float:
        return 3 + 0.1 * ((x + y + 10) / 2) ** 2 + 0.004 * (x - y + 4) ** 2

    trials = [Trial(32, 2.0**x, loss(x, y), weight_decay=2.0**y) for x in range(-10, -3) for y in range(-6, 1)]
    (picture,) = heat_maps(study(trials))
    axes = small_figure(picture).axes[0]
    assert len(axes.collections[0].get_offsets()) == 49
    assert "Star: fitted optimum, LR 0.00781" in picture.caption
    assert "weight decay goes as LR^-1 " in picture.caption
    star = next(line for line in axes.get_lines() if line.get_marker() == "*")
    assert float(star.get_xdata()[0]) == pytest.approx(3, abs=0.1)  # type: ignore[index]
    assert float(star.get_ydata()[0]) == pytest.approx(3, abs=0.1)  # type: ignore[index]
    assert heat_maps(study(PROXIES)) == []


def test_widths_are_compared_at_one_learning_rate(swept: Path) -> None:
    runs, found, _ = read_all([str(swept)])
    assert found is not None
    scale = {"sqrt": 0.5, "standard": 0.25, "none": 1.0}
    changed = []
    for run in runs:  # what was measured, made to depend on the rule
        factor = scale[run.rule]
        lines = [
            dataclasses.replace(line, relative_update=line.relative_update and line.relative_update * factor)
            for line in run.equilibrium
        ]
        align = [dataclasses.replace(line, top_singular_value=factor) for line in run.alignment]
        changed.append(dataclasses.replace(run, equilibrium=tuple(lines), alignment=tuple(align)))
    (comparison,) = comparisons(found.study, {f"{run.folder}/run.json": run for run in changed})
    assert [m.name for m in comparison.members] == ["proxy 32", "sqrt", "standard"]
    assert comparison.proxy is not None
    assert {m.run.arguments["lr"] for m in comparison.members} == {comparison.lr}
    assert abs(math.log2(comparison.lr) - PROXY) <= 0.5 + 1e-6
    overall, by_kind = comparison_galleries(comparison)
    pictures = {p.title: p for p in overall}
    for name, (_, y) in values_of(pictures["Relative update over the proxy's"]).items():
        if name:
            assert y == pytest.approx([scale[name]] * len(y))
    across = pictures["Top singular value of every kind across widths"]
    assert {n: y for n, (_, y) in values_of(across).items()} == {
        m: [scale[r]] * 4 for m, r in (("proxy 32", "none"), ("sqrt", "sqrt"), ("standard", "standard"))
    }
    assert "sqrt d^0.25, standard d^0.25" in across.caption
    assert len(by_kind) == 2 * 5


def test_sixty_runs_with_everything_stay_below_five_megabytes(
    template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have the same curves, so each kind of picture is drawn only once."""
    drawn: dict[str, str] = {}

    def svg_once(picture: Any, prefix: str, label: str) -> str:
        if picture.title not in drawn:
            drawn[picture.title] = svg(small_figure(picture), "PREFIX", label)
        return drawn[picture.title].replace("PREFIX", prefix)

    monkeypatch.setattr("megatron_patch.report.page.small_figure", lambda picture: picture)
    monkeypatch.setattr("megatron_patch.report.page.svg", svg_once)
    widths = [(32, "none"), *((w, rule) for w in (64, 128, 256) for rule in ("sqrt", "independent", "standard"))]
    trials = [trial for w, rule in widths for trial in curve(rule, w, PROXY, grid=range(-9, -3))]
    for place, trial in enumerate(trials):
        write_trial(tmp_path / f"t{place}", template, trial)
    runs, found, notes = read_all([str(tmp_path)])
    text = html_page(runs, found, notes)
    assert len(runs) == 60
    print(f"{len(text.encode()) / 1e6:.2f} MB")
    assert len(text.encode()) < 5_000_000
    assert text.count("<svg") > 60 + 4 + 4 * 7
    Page(text)


CHECK = """
    const svg = title => [...page.querySelectorAll("figure")].find(
      figure => figure.querySelector("b").textContent === title).querySelector("svg");
    const point = (picture, x, y) => {
      const at = new DOMPoint(x, y).matrixTransform(picture.getScreenCTM());
      return {clientX: at.x, clientY: at.y, bubbles: true};
    };
    const tip = page.querySelector(".tip");
    const said = (target, options) => {
      target.dispatchEvent(new view.PointerEvent("pointermove", options));
      return tip.hidden ? null : tip.textContent;
    };
    const curves = svg("sqrt");
    const texts = view.points(curves).map(found => found[2]);
    const over = view.points(curves).map(found => said(curves, point(curves, found[0], found[1])));
    const cell = page.querySelector("g.cell path");
    const box = cell.getBoundingClientRect();
    const inside = tip.getBoundingClientRect();
    return {
      texts, over,
      away: said(curves, point(curves, -500, -500)),
      cell: said(cell, {clientX: box.x + 2, clientY: box.y + 2, bubbles: true}),
      silent: [...page.querySelectorAll("svg[data-plots]")].filter(
        picture => view.points(picture).length === 0 && !picture.querySelector("g.cell")).length,
      tip: [inside.left >= 0, inside.right <= page.documentElement.clientWidth],
      unnamed: [...page.querySelectorAll("svg")].filter(picture => !picture.getAttribute("aria-label")).length,
    };
"""


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_of_a_sweep_works_in_a_browser(tmp_path: Path, scheme: str) -> None:
    """Values appear under the pointer, exact where they matter, at desktop and phone width; nothing overflows."""
    grid = [Trial(32, 2.0**x, 3.5 + 0.1 * (x + y) ** 2, weight_decay=2.0**y) for x in range(-3, 0) for y in range(1, 4)]
    found = sweep([*PROXIES, *SQRT, *STANDARD, *grid])
    for at in inspect(html_page((), found), tmp_path, CHECK, scheme).values():
        loss = f"width 128\nbase LR {2**-7:.4g}: loss {3.0 + BEND / 2 * 0.25:.4f}"
        assert loss in at["texts"]
        assert loss in at["over"]
        assert any(text.startswith("width 128\noptimum 0.011 [") for text in at["texts"])
        assert at["away"] is None
        assert at["cell"] == "weight decay 2, base LR 0.125: loss 3.9000"
        assert at["tip"] == [True, True]
        assert (at["silent"], at["unnamed"]) == (0, 0)


@needs_chromium
def test_the_page_of_runs_and_a_sweep_works_in_a_browser(page: str, tmp_path: Path) -> None:
    script = "return {silent: [...page.querySelectorAll('svg')].filter(svg => view.points(svg).length === 0).length};"
    assert all(at["silent"] == 0 for at in inspect(page, tmp_path, script).values())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("hidden_size,lr\n32,0.1\n", "t.csv with the columns hidden_size, lr: expected a column loss"),
        ("hidden_size,lr,loss\n", "expected at least one row below the header"),
        ("hidden_size,lr,loss\n32,x,3\n", "t.csv line 2 lr 'x': expected a number"),
    ],
)
def test_a_mistake_in_a_table_is_one_line(tmp_path: Path, tool: Tool, capsys: Any, content: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(content)
    assert tool("report", tmp_path / "t.csv", "--output", tmp_path / "r.html") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.csv"]


def test_a_training_ends_with_a_report_beside_its_metrics(
    template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    shutil.copytree(template, tmp_path / "run")
    folder = tmp_path / "run" / "transfer"
    monkeypatch.setattr("megatron_patch.upstream.record.measured_folder", lambda: str(folder))
    leave_report()
    assert capsys.readouterr().out == f"> report: {folder}/report.html\n"
    assert (folder / "report.html").exists() and (folder / "report.png").exists()
    (folder / "run.json").write_text("{")
    leave_report()
    assert "> no report on this run: " in capsys.readouterr().err
    monkeypatch.setattr("megatron_patch.upstream.record.measured_folder", lambda: None)
    leave_report()
    assert capsys.readouterr() == ("", "")


def test_the_picture_of_a_sweep_can_be_had_alone(tmp_path: Path) -> None:
    assert write_report((), str(tmp_path / "x.png"), sweep([*PROXIES, *SQRT])) == [str(tmp_path / "x.png")]
    assert json.dumps(sorted(p.name for p in tmp_path.iterdir())) == '["x.png"]'


def test_folders_of_tensorboard_files_are_read_as_trials(
    tmp_path: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `transfer` reads, the report reads; the files themselves are the business of tests/runs."""
    for trial in SQRT:
        (tmp_path / "logs" / str(trial.lr)).mkdir(parents=True)
        (tmp_path / "logs" / str(trial.lr) / "events.out.tfevents.1.host").write_bytes(b"")
    monkeypatch.setattr("megatron_patch.runs.foreign.read_tensorboard", lambda folder: by_lr[Path(folder).name])
    by_lr = {str(t.lr): t for t in SQRT}
    runs, found, notes = read_all([str(tmp_path / "logs")])
    assert (runs, notes) == ((), ()) and found is not None
    assert sorted(t.lr for t in found.study.trials) == [t.lr for t in SQRT]
    assert tool("report", tmp_path / "logs", "--output", tmp_path / "r.html") == 0


def test_a_large_table_makes_a_small_page_in_linear_time(tmp_path: Path) -> None:
    """Twice the seeds may not make more fits, lines, rows or cells: what is drawn has a bound."""

    def table(count: int) -> list[Trial]:
        random = np.random.default_rng(0)
        x, y = random.uniform(-10, -4, count), random.uniform(-6, 0, count)
        noise = 0.004 * random.normal(size=count)
        losses = 3 + 0.05 * (x + 6.5) ** 2 + 0.02 * (y + 3) ** 2 + noise
        return [
            Trial(32, 2.0**a, float(loss), weight_decay=2.0**b, rule="sqrt")
            for a, b, loss in zip(x, y, losses, strict=True)
        ]

    trials = [dataclasses.replace(t, weight_decay=0.1) for t in table(5000)]
    found = sweep(trials)
    page = html_page((), found)
    assert len(page) < 5e6
    assert "The first 1,000 of 5,000 trials" in page and page.count("<tr>") < 1100
    optimum = next(iter(found.study.curves.values())).optimum
    assert optimum is not None and optimum.log2_lr == pytest.approx(-6.5, abs=0.1)
    (picture,) = heat_maps(study(table(2000)))
    assert len(small_figure(picture).axes[0].collections[0].get_offsets()) <= 24 * 24
