"""A file is there as a whole or not at all."""

import os
from pathlib import Path

import pytest

from megatron_patch.files.whole import read_json, write_json, write_text


@pytest.mark.parametrize("flags", [{}, {"shared": True}, {"durable": True}])
def test_a_text_is_written_as_it_is(tmp_path: Path, flags: dict[str, bool]) -> None:
    path = tmp_path / "new" / "file.txt"
    for text in ("a\r\nb\n", "ü"):
        write_text(str(path), text, **flags)
        assert path.read_bytes() == text.encode()
    assert os.listdir(path.parent) == ["file.txt"]


@pytest.mark.parametrize("shared", [False, True])
def test_a_write_that_fails_leaves_the_old_file_alone(
    tmp_path: Path, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail(source: str, target: str) -> None:
        assert source != target
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        write_text(str(path), "new", shared=shared)
    assert os.listdir(tmp_path) == ["file.txt"]
    assert path.read_text() == "old"


def test_processes_that_share_a_path_have_files_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = []
    monkeypatch.setattr(os, "replace", lambda source, target: sources.append(source))
    for process in (1, 2):
        monkeypatch.setattr(os, "getpid", lambda process=process: process)
        write_text(str(tmp_path / "x"), "", shared=True)
    assert len(set(sources)) == 2


def test_json_can_be_read_by_people(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(str(path), {"a": [1, None]})
    assert path.read_text() == '{\n "a": [\n  1,\n  null\n ]\n}\n'
    assert read_json(str(path)) == {"a": [1, None]}
