"""A report read back: its tags, its tables, and the lines that its pictures draw."""

import json
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest

from megatron_patch.report.drawing import Picture, small_figure

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Collects what is in a page; fails on tags that do not match and on ids that are not unique."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tables: list[list[list[tuple[str, str | None]]]] = []  # tables of rows of (text, data-value)
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []
        ids = [value for _, name, value in self.attributes if name == "id"]
        assert len(ids) == len(set(ids))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append(("", dict(attrs).get("data-value")))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data
        if {"td", "th"} & set(self.open[-2:]):
            text, value = self.tables[-1][-1][-1]
            self.tables[-1][-1][-1] = (text + data, value)

    def table(self, *columns: str) -> list[dict[str, tuple[str, str | None]]]:
        """The rows of the one table whose first headings are `columns`, by heading."""
        (found,) = (t for t in self.tables if tuple(text for text, _ in t[0][: len(columns)]) == columns)
        return [dict(zip((text for text, _ in found[0]), row, strict=True)) for row in found[1:]]


def number(cell: tuple[str, str | None]) -> float:
    """The exact number behind a cell, which what is shown must round to."""
    text, value = cell
    assert value is not None
    assert float(text.replace(",", "")) == pytest.approx(float(value), rel=1e-3)
    return float(value)


def values_of(picture: Picture) -> dict[str, tuple[list[float], list[float]]]:
    """The lines that a picture draws, by the name that appears under the pointer."""
    found = {}
    for artist in small_figure(picture).axes[0].get_lines():
        gid = unquote(str(artist.get_gid()))
        if gid.startswith("hover:"):
            found[json.loads(gid.removeprefix("hover:").removesuffix(":"))[0]] = (
                list(map(float, artist.get_xdata())),  # type: ignore[arg-type]
                list(map(float, artist.get_ydata())),  # type: ignore[arg-type]
            )
    return found
