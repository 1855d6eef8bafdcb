"""The report holds the numbers of the files, is one well-formed page with nothing foreign, and works in a browser."""

import dataclasses
import doctest
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from megatron_patch.files.lines import AlignmentLine
from megatron_patch.fit import curves, report_card
from megatron_patch.report import charts_layers as layer_pictures
from megatron_patch.report import drawing, layers
from megatron_patch.report.charts_layers import every_layer, warmup_pictures
from megatron_patch.report.charts_run import alignment_pictures, equilibrium_pictures, overview, training_pictures
from megatron_patch.report.drawing import Line, Picture, draw_lines, small_figure
from megatron_patch.report.page import MOST_DETAILED, html_page, print_summary, write_report
from megatron_patch.report.svg import svg
from megatron_patch.runs.run import Run, read_runs
from megatron_patch.runs.tensorboard import Series
from tests.support.browser import inspect, needs_chromium
from tests.support.report_page import Page, number, values_of
from tests.support.run_folders import LAYERS, STEPS, alignment_line, lr_factor, train_loss, write_record, write_run

Tool = Callable[..., int]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run without alignment, which is drawn fast."""
    return read_runs([str(write_run(tmp_path_factory.mktemp("runs") / "bare", alignment=False))])[0]


@pytest.fixture(scope="module")
def text(run: Run) -> str:
    """The page of `run`."""
    return html_page([run])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run with everything."""
    return read_runs([str(write_run(tmp_path_factory.mktemp("runs") / "quick"))])[0]


def test_tables_hold_the_numbers_of_the_files(run: Run, text: str) -> None:
    page = Page(text)
    classes = {row["class"][0]: row for row in page.table("class", "m", "peak LR")}
    assert run.hyperparameters is not None
    for p in run.hyperparameters.parameters:
        row = classes[p.role]
        assert [number(row[c]) for c in ("m", "peak LR", "weight decay", "eps")] == [p.m, p.lr, p.weight_decay, p.eps]
        assert (number(row["tensors"]), number(row["parameters"])) == (1, 64 * 64)
    kinds = {row["kind"][0]: row for row in page.table("kind")}
    assert set(kinds) == {*LAYERS, "output"}
    last = alignment_line(STEPS - 2, "x", 64)  # at the last iteration the learning rate is 0
    for heading, key in (("α_W", "weight_alignment"), ("α_ΔW", "update_alignment"), ("RWU", "relative_update")):
        assert number(kinds["q"][heading]) == last[key]
    assert number(kinds["q"]["layers"]) == 3
    assert kinds["q"]["top singular value"] == ("–", None)
    flags = {row[0][0]: row[1][0] for t in page.tables if t[1][0][0] == "--lr" for row in t[1:]}
    assert flags == {"--lr": "0.02", "--swiglu": "on", "--metrics-dir": "a b"}
    for fact in ("2.1875", "2.1625 at 20", "2.2031", f"{train_loss(1):.4f} → {train_loss(STEPS):.4f}", "2 min 05 s"):
        assert fact in page.text


def test_page_is_whole_by_itself(text: str) -> None:
    page = Page(text)
    for tag, name, value in page.attributes:
        assert tag not in ("link", "img", "iframe", "object", "base"), tag
        if name in ("src", "href", "srcset", "action", "data", "style", "xlink:href"):
            assert value.startswith("#") or name == "style", (tag, name, value)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", text)
    references = {value.removeprefix("#") for _, name, value in page.attributes if name == "href"}
    references |= set(re.findall(r"url\(#([^)]*)\)", text))
    assert references <= {value for _, name, value in page.attributes if name == "id"}


def test_every_picture_has_a_text(run: Run, text: str) -> None:
    page = Page(text)
    drawn = sum(tag == "svg" and name == "viewbox" for tag, name, _ in page.attributes)
    labels = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]
    expected = training_pictures(run) + alignment_pictures(run) + equilibrium_pictures(run)
    assert len(expected) == 4 + 6 + 3
    layers = every_layer(run) + warmup_pictures(run)
    assert len(layers) == 2 + len(LAYERS) + 1
    assert drawn == len(labels) == len(expected + layers)
    assert all(len(label) > 40 for label in labels)
    assert "training loss from 5 to 2.075; validation loss from 2.438 to 2.188" in labels[0]
    assert "matrix: peak 0.004875" in labels[1]


@pytest.mark.parametrize("kind", ["none", "exp", "decay-away"])
def test_warmups_follow_the_schedule_that_was_logged(run: Run, kind: str) -> None:
    """The LR without the warmup is found again from the logged one; factors by the equations written out."""
    lr, decay, m = 0.01, 0.5, 4.0
    plain = [lr * lr_factor(t) for t in range(STEPS)]
    product, factors = 1.0, []
    for rate in plain:
        factors.append((1 + (m**2 - 1) * product) ** -0.5)
        product *= (1 - rate * decay) ** 2
    exp = [m ** min(0.0, t / 20 - 1) for t in range(STEPS)]
    used = {"none": [1.0] * STEPS, "exp": exp, "decay-away": factors}[kind]
    # CLASSES' vector class has the peak LR 0.01; what is logged at iteration t is the LR of step t.
    logged = Series(tuple(range(STEPS)), tuple(rate * f for rate, f in zip(plain, used, strict=True)))
    arguments = {
        **run.arguments,
        "lr": lr,
        "weight_decay": decay,
        "extra_warmup": kind,
        "extra_warmup_iters": 20 if kind == "exp" else None,
        "init_scaling": "fan-in",
    }
    changed = dataclasses.replace(run, arguments=arguments, series={"lr/vector": logged})
    lines = values_of(warmup_pictures(changed)[0])
    assert lines["decay-away" if kind != "decay-away" else "decay-away (in use)"][1] == pytest.approx(factors, rel=1e-5)
    assert ("exp (in use)" in lines) == (kind == "exp")
    if kind == "exp":
        assert lines["exp (in use)"][1] == pytest.approx(exp)
    assert lines["implicit"][1][0] == pytest.approx(1 / m)
    assert lines["implicit"][1] == sorted(lines["implicit"][1])


def test_the_same_run_gives_the_same_bytes(bare: Run) -> None:
    assert html_page([bare]) == html_page([bare])


def test_names_from_outside_are_escaped(bare: Run) -> None:
    evil = '<script>alert("1")</script>&amp; $x_1$'
    series = {**bare.series, f"lr/{evil}": bare.series["lr/matrix"]}
    changed = dataclasses.replace(
        bare, name=evil, series=series, arguments={**bare.arguments, evil: evil}, notes=(evil,)
    )
    text = html_page([changed, bare])
    assert "<script>alert" not in text
    assert text.count("<script>") == 1
    assert evil in Page(text).text
    assert overview(changed) is not None


def test_experts_count_by_their_mean(bare: Run) -> None:
    name = "decoder.layers.0.mlp.experts.linear_fc1.{}/gate"
    shares = {"weight0": 0.1, "weight1": 0.5, "mean": 0.4}
    lines = [
        alignment_line(
            4, name.format(part), 64, weight_alignment=share, kind="expert_mean" if part == "mean" else "column"
        )
        for part, share in shares.items()
    ]
    run = dataclasses.replace(bare, alignment=tuple(AlignmentLine(**line) for line in lines))
    page = Page(html_page([run]))
    (row,) = page.table("kind")
    assert (row["kind"][0], number(row["layers"]), number(row["α_W"])) == ("experts gate", 1, 0.4)
    assert len(page.table("layer")) == 3
    assert "experts gate 0.4" in alignment_pictures(run)[0].text


@pytest.mark.parametrize("module", [drawing, layers, curves, report_card, layer_pictures])
def test_examples_in_docstrings(module: ModuleType) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("missing", ["tensorboard", "alignment", "both"])
def test_missing_pieces_leave_the_rest(tmp_path: Path, missing: str) -> None:
    (run,) = read_runs([str(write_run(tmp_path / "a", missing == "alignment", missing == "tensorboard"))])
    page = Page(html_page([run]))
    assert ("α_ΔW" in page.text) == (missing == "tensorboard")
    assert ("Gradient norm" in page.text) == (missing == "alignment")
    assert "Loss" in page.text
    assert run.notes[0] in page.text


def test_a_run_that_has_just_begun_has_a_page_but_no_picture(tmp_path: Path) -> None:
    (tmp_path / "transfer").mkdir()
    empty: dict[str, Any] = {"status": "running", "iteration": 0, "train_iterations": None, "evaluations": []}
    write_record(tmp_path / "transfer", {**empty, "final_loss": None, "train_loss": None})
    runs = read_runs([str(tmp_path)])
    assert write_report(runs, str(tmp_path / "r.html")) == [str(tmp_path / "r.html")]
    assert "No losses were recorded" in Page((tmp_path / "r.html").read_text()).text
    with pytest.raises(ValueError, match="recorded no losses to draw"):
        write_report(runs, str(tmp_path / "r.png"))


def test_losses_that_are_no_numbers_are_drawn_as_gaps() -> None:
    nan = float("nan")
    for values in ([3.0, nan, 2.0], [nan, nan, nan], [float("inf"), 3.0, nan]):
        picture = Picture("x", "x", lambda axes, y=values: draw_lines(axes, [Line("train", [1, 2, 3], y)], log=True))
        assert "nan" not in svg(small_figure(picture), "p", "x")


def test_many_runs_stay_small(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fifty long runs with everything. They have the same curves, so each kind of picture is drawn only once."""
    drawn: dict[str, str] = {}

    def svg_once(picture: Picture, prefix: str, label: str) -> str:
        if picture.title not in drawn:
            drawn[picture.title] = svg(small_figure(picture), "PREFIX", label)
        return drawn[picture.title].replace("PREFIX", prefix)

    monkeypatch.setattr("megatron_patch.report.page.small_figure", lambda picture: picture)
    monkeypatch.setattr("megatron_patch.report.page.svg", svg_once)
    steps = tuple(range(1, 2001))
    series = {tag: Series(steps, s.values * 50) for tag, s in run.series.items()}
    rates = [2.0**-i for i in range(50)]
    runs = [
        dataclasses.replace(
            run, name=f"lr 2^-{i}", series=series, arguments={**run.arguments, "lr": rate}, final_loss=3.0 + rate
        )
        for i, rate in enumerate(rates)
    ]
    text = html_page(runs)
    assert len(text.encode()) < 5_000_000
    page = Page(text)
    rows = page.table("run", "validation loss", "best", "training loss", "lr", "iterations")
    assert [number(row["validation loss"]) for row in rows] == [3.0 + rate for rate in rates]
    assert [number(row["lr"]) for row in rows] == rates
    assert f"More than {MOST_DETAILED} runs" in page.text


def test_the_tool_writes_page_and_picture_and_prints_a_summary(
    tmp_path: Path, tool: Tool, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "quick")
    assert tool("report", tmp_path / "quick", "--output", tmp_path / "new" / "report.html") == 0
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["report.html", "report.png"]
    assert (tmp_path / "new" / "report.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for text in ("quick", "40 of 40", "2 min 05 s", "5.0000 → 2.0750", "2.1875", "2.1625 at 20"):
        assert text in printed
    assert f"report:  {tmp_path}/new/report.html\npicture: {tmp_path}/new/report.png\n" in printed


def test_the_tool_draws_the_picture_alone(tmp_path: Path, tool: Tool) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b")
    assert tool("report", tmp_path / "a", tmp_path / "b", "--output", tmp_path / "both.png") == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "both.png"]


@pytest.mark.parametrize(
    ("run_folder", "output", "message"),
    [
        ("nothing", "r.html", "RUN {}/nothing: expected the folder of a run"),
        ("a", "r.pdf", "--output {}/r.pdf: expected a file that ends in .html or .png"),
        ("a", "folder.html", "--output {}/folder.html: expected a file"),
        ("a", "file/r.html", "--output {}/file/r.png: expected a folder that can be written to"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    tmp_path: Path, tool: Tool, capsys: pytest.CaptureFixture[str], run_folder: str, output: str, message: str
) -> None:
    write_run(tmp_path / "a", alignment=False)
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    assert tool("report", tmp_path / run_folder, "--output", tmp_path / output) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: " + message.format(tmp_path))
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_an_old_report_is_replaced_as_a_whole(bare: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "r.html"
    output.write_text("old")

    def fail(*given: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("megatron_patch.report.page.html_page", fail)
        with pytest.raises(KeyboardInterrupt):
            write_report([bare], str(output))
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("r.html", "old")]
    write_report([bare], str(output))
    assert output.read_text().startswith("<!DOCTYPE html>")


def test_notes_are_part_of_the_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = read_runs([str(write_run(tmp_path / "a", tensorboard=False))])
    print_summary(runs, [], Console(width=80))
    assert f"a: {runs[0].notes[0]}\n" in capsys.readouterr().out


@pytest.fixture(scope="module")
def four_runs(run: Run, bare: Run) -> str:
    """A page of several runs, one with everything."""
    losses = (2.5, 10.0, None, 2.25)
    runs = [dataclasses.replace(bare, name=f"r{i}", final_loss=loss) for i, loss in enumerate(losses)]
    return html_page([dataclasses.replace(run, name="r0", final_loss=losses[0]), *runs[1:]])


CHECK = """
    const style = element => view.getComputedStyle(element);
    const table = page.querySelector("table");
    const column = () => [...table.tBodies[0].rows].map(row => row.cells[1].textContent);
    const orders = [column()];
    for (let i = 0; i < 2; i++) { table.tHead.rows[0].cells[1].querySelector("button").click(); orders.push(column()); }
    const text = page.querySelector("svg text");
    const pictures = [...page.querySelectorAll("svg[data-plots]")];
    return {
      orders,
      background: style(page.body).backgroundColor,
      ink: style(text).fill,
      line: style(page.querySelector("svg path[style*='var(--line0)']")).stroke,
      picture: page.querySelector("svg").getBoundingClientRect().width,
      letters: text.getBoundingClientRect().height,
      silent: pictures.filter(svg => view.points(svg).length === 0).length,
      loss: view.points(page.querySelector("details.run svg")).map(point => point[2]),
    };
"""


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_works_in_a_browser(four_runs: str, tmp_path: Path, scheme: str) -> None:
    """At desktop and phone width, in light and dark: no console message, no sideways scrolling, tables sort."""
    for found in inspect(four_runs, tmp_path, CHECK, scheme).values():
        assert found["orders"] == [
            ["2.5", "10", "–", "2.25"],
            ["2.25", "2.5", "10", "–"],
            ["10", "2.5", "2.25", "–"],
        ]
        assert found["background"] == ("rgb(17, 21, 26)" if scheme == "dark" else "rgb(255, 255, 255)")
        assert found["ink"] == ("rgb(223, 229, 236)" if scheme == "dark" else "rgb(36, 41, 47)")
        assert found["line"] == ("rgb(74, 168, 232)" if scheme == "dark" else "rgb(0, 114, 178)")
        assert found["picture"] > 280
        assert found["letters"] >= 9  # pixels
        assert found["silent"] == 0
        # What appears under the pointer are the numbers of the run, to four digits.
        shown = [text.split("\n") for text in found["loss"]]
        validation = [value for name, value in shown if name == "validation"]
        assert [value.partition(": ")[0] for value in validation] == ["iteration 10", "iteration 20", "iteration 40"]
        assert [float(value.partition(": ")[2]) for value in validation] == pytest.approx(
            [2.4375, 2.1625, 2.1875], rel=5e-4
        )
        assert sum(name == "train" for name, _ in shown) == STEPS
