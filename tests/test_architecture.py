"""The picture and the table of docs/architecture.md are those of `FLOORS`, so that they cannot lie.

python -m tests.test_architecture    # writes both anew, after a change of FLOORS
"""

import re
from pathlib import Path

import pytest

from tests.support.floors import FLOORS, Floor

PAGE = Path(__file__).parents[1] / "docs/architecture.md"
PICTURE = re.compile(r"```mermaid\n(flowchart TD\n.*?)```\n", re.DOTALL)
TABLE = re.compile(r"\| floor \| what it is \|.*?\n\n", re.DOTALL)


def below(floors: dict[str, Floor], room: str) -> set[str]:
    """Every floor that `room` stands on, directly or not."""
    direct = set(floors[room].imports.split())
    return direct.union(*(below(floors, other) for other in direct))


def edges(floors: dict[str, Floor]) -> list[tuple[str, str]]:
    """Who imports whom, without what follows from the rest: ``a -> c`` where there are ``a -> b`` and ``b -> c``."""
    found = []
    for room, floor in floors.items():
        direct = set(floor.imports.split())
        implied = set().union(*(below(floors, other) for other in direct))
        found += [(room, other) for other in sorted(direct - implied)]
    return found


def picture(floors: dict[str, Floor]) -> str:
    """The floors as mermaid draws them: what nobody imports on top, an arrow to what is imported."""
    lines = [f"    {room}" for room in reversed(floors)]
    lines += [f"    {room} --> {other}" for room, other in edges(floors)]
    return "\n".join(["flowchart TD", *lines]) + "\n"


def table(floors: dict[str, Floor]) -> str:
    """The floors from the ground up, with everything each may import."""
    rows = ["| floor | what it is | may import | from outside |", "|---|---|---|---|"]
    for room, floor in floors.items():
        cells = (f"`{room}`", floor.why, floor.imports.replace(" ", ", "), floor.packages.replace(" ", ", "))
        rows.append("| " + " | ".join(cell or "-" for cell in cells) + " |")
    return "\n".join(rows) + "\n\n"


def test_the_picture_is_that_of_the_floors() -> None:
    (drawn,) = PICTURE.findall(PAGE.read_text())
    assert drawn == picture(FLOORS), "write it anew: python -m tests.test_architecture"


def test_the_table_is_that_of_the_floors() -> None:
    (written,) = TABLE.findall(PAGE.read_text())
    assert written == table(FLOORS), "write it anew: python -m tests.test_architecture"


def test_an_arrow_that_follows_from_others_is_left_out() -> None:
    floors = {"a": Floor(""), "b": Floor("", "a"), "c": Floor("", "a b"), "d": Floor("", "a")}
    assert edges(floors) == [("b", "a"), ("c", "b"), ("d", "a")]


def test_a_forbidden_import_would_change_the_picture() -> None:
    floors = {**FLOORS, "theory": Floor(FLOORS["theory"].why, "errors")}
    assert picture(floors) != picture(FLOORS)
    assert table(floors) != table(FLOORS)


@pytest.mark.parametrize("room", FLOORS)
def test_a_floor_stands_on_lower_ones(room: str) -> None:
    """The order of the table is that of the picture: nothing imports from a later line."""
    order = list(FLOORS)
    assert all(order.index(other) < order.index(room) for other in FLOORS[room].imports.split())


if __name__ == "__main__":
    text = PICTURE.sub(lambda _: f"```mermaid\n{picture(FLOORS)}```\n", PAGE.read_text())
    PAGE.write_text(TABLE.sub(lambda _: table(FLOORS), text))
