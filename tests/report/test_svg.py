"""What the page's pictures take for granted of Matplotlib's SVG, one test each: a release that differs fails here."""

import io
import json
import re
import xml.etree.ElementTree as ElementTree
from html import unescape
from urllib.parse import quote

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.transforms import AffineDeltaTransform

from megatron_patch.report.drawing import _STYLE, INK, LIGHT, Picture, hover, hover_cells, small_figure
from megatron_patch.report.svg import svg

X, Y = (0.0, 1.0, 2.0, 4.0), (1.0, 3.0, 2.0, 5.0)
NAME = 'a "line" & <more>: 100%'
TAG = "{http://www.w3.org/2000/svg}"


def draw(axes: Axes) -> None:
    """A line and marks without a line, with names, and a bar."""
    (line,) = axes.plot(X, Y, color=LIGHT[0])
    line.set_gid(hover(NAME))
    marks = axes.scatter(X, Y, color=LIGHT[1], marker="*")
    marks.set_gid(hover("marks", list("abcd")))
    axes.bar([3.0], [2.0], color=LIGHT[2])
    axes.set_xlabel("step")
    axes.set_ylim(0, 6)


def draw_cells(axes: Axes, cells: list[tuple[int, int]], texts: list[str]) -> None:
    """Unit squares around places."""
    squares = PolyCollection(
        [[(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)]],
        transform=AffineDeltaTransform(axes.transData),
        offsets=cells,
        offset_transform=axes.transData,
        facecolors=LIGHT[2],
    )
    squares.set_gid(hover_cells(texts))
    axes.add_collection(squares, autolim=False)
    axes.set_xlim(-0.5, 2.5)
    axes.set_ylim(-0.5, 3.5)


@pytest.fixture(scope="module")
def figure() -> Figure:
    return small_figure(Picture("title", "text", draw))


@pytest.fixture(scope="module")
def raw(figure: Figure) -> str:
    """What Matplotlib writes."""
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return buffer.getvalue()


@pytest.fixture(scope="module")
def ours(figure: Figure) -> str:
    """What the page gets."""
    return svg(figure, "p0-", "text")


def group(text: str, name: str) -> ElementTree.Element:
    """The one group of our SVG that has the hover name."""
    root = ElementTree.fromstring(text)
    (found,) = (e for e in root.iter() if "data-hover" in e.attrib and json.loads(e.get("data-hover", ""))[0] == name)
    return found


def test_a_style_sheet_alone_stands_before_the_drawing(raw: str) -> None:
    """All before the first end of definitions is cut off."""
    head = raw[: raw.index("</defs>")]
    assert "<style" in head
    assert not re.search(r"<(g|path|text|use)\b", head)
    assert raw.rstrip().endswith("</svg>")


def test_a_gid_is_an_id_as_it_was_given(raw: str) -> None:
    """It is percent-encoded: nothing in it is escaped once more."""
    assert f' id="hover:{quote(json.dumps([NAME]), safe="")}:"' in raw


def test_ids_that_end_in_a_number_are_referred_to_by_nobody(raw: str) -> None:
    """They are taken out, since every picture of a page has the same."""
    counted = set(re.findall(r' id="([^"]*_\d+)"', raw))
    assert {"figure_1", "axes_1"} <= counted
    assert not counted & set(re.findall(r"#([\w-]+)", raw))


def test_references_are_written_in_two_ways(raw: str, ours: str) -> None:
    """Ids get a prefix; so must all that refers to them."""
    assert set(re.findall(r'([\w:]+="|url\()#', raw)) >= {'xlink:href="', "url("}
    targets = set(re.findall(r' id="([^"]*)"', ours))
    references = set(re.findall(r'(?:href="#|url\(#)([^")]*)', ours))
    assert references <= targets
    assert references
    assert all(name.startswith("p0-") for name in targets)
    ElementTree.fromstring(ours)


def test_a_line_is_one_path_of_all_its_points_in_the_pictures_units(ours: str) -> None:
    """The page's script reads values off ``M x y L x y``, as data-plots says how."""
    (path,) = (child for child in group(ours, NAME) if child.tag in ("path", f"{TAG}path"))
    places = re.findall(r"([ML]) ?(-?[\d.]+) (-?[\d.]+)", path.get("d", ""))
    assert [kind for kind, _, _ in places] == ["M", "L", "L", "L"]
    (plots,) = json.loads(unescape(re.findall(r'data-plots="([^"]*)"', ours)[0]))
    for axis, at, expected in ((0, 1, X), (1, 2, Y)):
        start, end, low, high, scale = plots[axis]
        assert scale == "linear"
        read = [low + (float(place[at]) - start) / (end - start) * (high - low) for place in places]
        np.testing.assert_allclose(read, expected, atol=0.01 * (high - low) / abs(end - start) * 2)
    assert plots[2] == "step"


def test_a_long_line_keeps_every_point() -> None:
    """Points on a straight line would be left out by default."""

    def straight(axes: Axes) -> None:
        axes.plot(range(3000), range(3000))[0].set_gid(hover("straight"))

    text = svg(small_figure(Picture("", "", straight)), "p", "")
    (path,) = (child for child in group(text, "straight") if child.tag in ("path", f"{TAG}path"))
    assert len(re.findall("[ML]", path.get("d", ""))) == 3000


def test_marks_without_a_line_are_uses_with_places(ours: str) -> None:
    """A path among them would be taken for a line of points."""
    marks = group(ours, "marks")
    assert not [child for child in marks if child.tag in ("path", f"{TAG}path")]
    uses = [child for child in marks.iter() if child.tag in ("use", f"{TAG}use")]
    assert len(uses) == len(X)
    assert all(float(use.get("x", "nan")) > 0 and float(use.get("y", "nan")) > 0 for use in uses)


@pytest.mark.parametrize("rows", [1, 4])
def test_cells_are_drawn_in_the_order_of_their_texts(rows: int) -> None:
    """The page's script looks a text up by the place of the element under the pointer.

    A few have a path each, in the group; of many there is one path in the definitions, used often.
    """
    cells = [(x, y) for y in range(rows) for x in range(3)]
    picture = Picture("", "", lambda axes: draw_cells(axes, cells, [f"cell {place}" for place in range(len(cells))]))
    text = svg(small_figure(picture), "p0-", "text")
    found = group(text, "cell 0")
    assert found.get("class") == "cells"
    defined = {id(e) for definitions in found.iter("defs") for e in definitions.iter()}
    drawn = [e for e in found.iter() if e.tag in ("use", "path") and id(e) not in defined]
    if rows > 1:
        assert all(e.tag == "use" for e in drawn)
        centers = [(float(e.get("x", "nan")), float(e.get("y", "nan"))) for e in drawn]
    else:
        corners = [re.findall(r"[ML] (-?[\d.]+) (-?[\d.]+)", e.get("d", "")) for e in drawn]
        centers = [tuple(np.mean(np.array(corner, dtype=float), axis=0)) for corner in corners]
    (plots,) = json.loads(unescape(re.findall(r'data-plots="([^"]*)"', text)[0]))
    for place, (start, end, low, high, _) in enumerate(plots[:2]):
        read = [low + (center[place] - start) / (end - start) * (high - low) for center in centers]
        assert read == pytest.approx([cell[place] for cell in cells], abs=0.05)


def test_colours_are_lower_case_hex(raw: str, ours: str) -> None:
    """They become the page's variables."""
    assert all(color in raw for color in (INK, *LIGHT[:3]))
    assert not re.search(r"#[0-9a-f]{6}", ours.replace("#000000", "").replace("#ffffff", ""))
    assert all(f"var(--line{place})" in ours for place in range(3))


def test_text_is_text_in_a_font_that_can_be_cut_out(raw: str, ours: str) -> None:
    """With svg.fonttype none a font has a family, which is the page's to choose, with something behind it."""
    assert re.search(r"font-family: [^;]*; ", raw)
    assert "font-family" not in ours
    assert re.search(r"<text[^>]*>step</text>", ours)
    assert "rotate(-0 " in raw and "rotate(-0 " not in ours


def test_the_same_picture_is_the_same_text() -> None:
    """Reports of the same runs can be compared: ids do not depend on what was drawn before."""
    first, second = (svg(small_figure(Picture("title", "text", draw)), "p0-", "text") for _ in range(2))
    assert first == second
