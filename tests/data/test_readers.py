"""What a file holds is what is read: no ending, compression, mark or guessed type changes a text without a word."""

import bz2
import codecs
import csv
import io
import json
import lzma
import os
import re
import tarfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_patch.data import readers
from megatron_patch.data.corpus import open_corpus
from megatron_patch.errors import ConfigError
from tests.support.compressed import gzipped

Tool = Callable[..., int]

ROWS = b'{"text": "one"}\n{"text": "two"}\n'
TABLE = b"text\none\ntwo\n"
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def read(path: object, **settings: Any) -> list[str]:
    """The documents of a corpus, in order."""
    return [text for batch in open_corpus(str(path), **settings).batches for text in batch]


def put(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def zstd(content: bytes) -> bytes:
    packed = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(packed, "zstd") as stream:
        stream.write(content)
    whole: bytes = packed.getvalue().to_pybytes()
    return whole


def parquet(texts: Any) -> bytes:
    packed = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"n": range(len(texts)), "text": texts}), packed)
    return packed.getvalue()


def arrow(write: Callable[..., Any]) -> bytes:
    packed, table = io.BytesIO(), pyarrow.table({"text": ["one", "two"]})
    with write(packed, table.schema) as writer:
        writer.write_table(table)
    return packed.getvalue()


def tar(name: str = "x.txt") -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(name))
    return packed.getvalue()


def zipped() -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("x.txt", "stored as it is, so all of it is UTF-8")
    return packed.getvalue()


# Endings and compressions


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("DATA.JSONL", ROWS),
        ("a.Json", ROWS),
        ("a.jsonlines", ROWS),
        ("a.NDJSON", ROWS),
        ("A.JSONL.GZ", gzipped(ROWS)),
        ("a.jsonl.gz", gzipped(ROWS[:16]) + gzipped(ROWS[16:])),
        ("a.jsonl.Bz2", bz2.compress(ROWS)),
        ("a.jsonl.xz", lzma.compress(ROWS[:16]) + lzma.compress(ROWS[16:])),
        ("a.jsonl.zst", zstd(ROWS)),
        ("two_frames.jsonl.ZST", zstd(ROWS[:16]) + zstd(ROWS[16:])),
        ("a.CSV", TABLE),
        ("a.csv.gz", gzipped(TABLE)),
        ("a.pq", parquet(["one", "two"])),
        ("A.PARQUET", parquet(["one", "two"])),
        ("a.parquet.gz", gzipped(parquet(["one", "two"]))),
        ("a.parquet.zst", zstd(parquet(["one", "two"]))),
        ("stream.arrow", arrow(pyarrow.ipc.new_stream)),
        ("file.Arrow", arrow(pyarrow.ipc.new_file)),
        ("file.arrow.xz", lzma.compress(arrow(pyarrow.ipc.new_file))),
    ],
)
def test_format_and_compression_follow_the_ending_in_any_case(name: str, content: bytes, tmp_path: Path) -> None:
    assert read(put(tmp_path, name, content)) == ["one", "two"]


def test_format_can_be_told(tmp_path: Path) -> None:
    assert read(put(tmp_path, "a.txt", ROWS), format="json") == ["one", "two"]
    assert read(put(tmp_path, "b.jsonl", b"plain"), format="text") == ["plain"]
    assert read(put(tmp_path, "c.tsv", b"a\tb"), format="text") == ["a\tb"]
    assert read(put(tmp_path, "d.0001", parquet(["one"])), format="parquet") == ["one"]


@pytest.mark.parametrize(("spec", "hub"), [("stdlib", False), (".", False), ("owner/name", True)])
def test_format_is_refused_where_it_means_nothing(spec: str, hub: bool) -> None:
    with pytest.raises(ConfigError, match="--format json: expected a file or a glob"):
        open_corpus(spec, hub=hub, format="json")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", ROWS),
        ("a.txt", codecs.BOM_UTF8 + b"\n \n" + ROWS),
        ("part-0001", ROWS),
        ("a.txt.gz", gzipped(ROWS)),
        ("one_long_line.txt", b'{"text": "' + b"x" * 300_000 + b'"}\n'),
        ("cut_in_a_list.txt", b'{"words": [' + b'"word", ' * 50_000 + b'"end"]}\n'),
    ],
)
@pytest.mark.parametrize("per_line", [False, True])
def test_text_that_begins_like_json_lines_is_refused(name: str, content: bytes, per_line: bool, tmp_path: Path) -> None:
    path = put(tmp_path, name, content)
    with pytest.raises(ConfigError, match=r"--input .*JSON lines by its first line.*--format json; --format text"):
        open_corpus(str(path), document_per_line=per_line)
    assert "{" in "".join(read(path, document_per_line=per_line, format="text"))


@pytest.mark.parametrize(
    "text", ["{", "{\n  int main", "{ x }\n", '{"a": b}\n', "[1]\n", "{{template}}", '"quoted"', ""]
)
def test_text_with_braces_is_text(text: str, tmp_path: Path) -> None:
    assert read(put(tmp_path, "a.txt", text.encode())) == [text]


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.tar.gz", gzipped(tar()), "an archive; unpack it"),
        ("A.TGZ", gzipped(tar()), "an archive; unpack it"),
        ("a.tar", tar(), "an archive; unpack it"),
        ("a.zip", zipped(), "an archive; unpack it"),
        ("a.jsonl.zip", zipped(), "an archive; unpack it"),
        ("a.txt.lz4", b"\x04\x22\x4d\x18", "a compression not known here; decompress it"),
        ("a.tsv", b"a\tb\n", r"a table by its name; make it \.csv"),
        ("a.txt", tar(), "a tar archive by its first bytes; unpack it"),
        ("a.txt.gz", gzipped(tar()), "a tar archive by its first bytes; unpack it"),
        ("a.jsonl.zst", zstd(tar()), "a tar archive by its first bytes; unpack it"),
        ("a.txt", zipped(), "a zip archive.* by its first bytes; unpack it"),
        ("a.csv", zipped(), "a zip archive.* by its first bytes; unpack it"),
        ("a.jsonl", gzipped(ROWS), r"compressed with gzip .*; let its name end in \.gz"),
        ("a.jsonl.gz", gzipped(gzipped(ROWS)), r"compressed with gzip .*; let its name end in \.gz"),
        ("a.txt", bz2.compress(ROWS), r"compressed with bzip2 .*; let its name end in \.bz2"),
        ("a.txt", lzma.compress(ROWS), r"compressed with xz .*; let its name end in \.xz"),
        ("a.txt", zstd(ROWS), r"compressed with zstd .*; let its name end in \.zst"),
        ("a.txt", parquet(["one"]), "a parquet file .* --format parquet"),
        ("a.feather", arrow(pyarrow.ipc.new_file), "an Arrow file .* --format arrow"),
        ("a.txt", b"%PDF-1.4\n", "a PDF document .*; extract its text"),
        ("a.txt", "one".encode("utf-16"), "UTF-16 by .*; convert it: iconv -f UTF-16"),
        ("a.jsonl", ROWS.decode().encode("utf-16"), "UTF-16 by .*; convert it: iconv -f UTF-16"),
        ("a.csv", codecs.BOM_UTF16_BE + "text".encode("utf-16-be"), "UTF-16 by .*; convert it"),
        ("a.txt", "one".encode("utf-32"), "UTF-32 by .*; convert it: iconv -f UTF-32"),
    ],
)
def test_what_is_no_text_is_refused_before_anything_is_read(
    name: str, content: bytes, what: str, tmp_path: Path
) -> None:
    put(tmp_path, name, content)
    put(tmp_path, "0.txt", b"a good file that comes first")
    with pytest.raises(ConfigError, match=rf"--input .*{name}: expected UTF-8 text, .* this is {what}"):
        open_corpus(str(tmp_path / "*"))


def test_bytes_that_are_no_text_are_refused_whatever_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="this is a tar archive by its first bytes"):
        open_corpus(str(put(tmp_path, "a.txt", tar())), format="text")


@pytest.mark.parametrize("cut", [1, 5, 20])
@pytest.mark.parametrize(("ending", "compress"), [(".gz", gzipped), (".xz", lzma.compress), (".zst", zstd)])
def test_compressed_file_that_is_cut_off_is_refused(
    ending: str, compress: Callable[[bytes], bytes], cut: int, tmp_path: Path
) -> None:
    content = compress("".join(map(str, range(100_000))).encode())
    with pytest.raises(ConfigError, match=rf"a\.txt{ending}: expected a readable text source"):
        read(put(tmp_path, f"a.txt{ending}", content[:-cut]))


def test_pipe_is_read_from_its_beginning(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=put, args=(tmp_path, "pipe", b"all of it"))
    writer.start()
    assert read(tmp_path / "pipe") == ["all of it"]
    writer.join()


# Byte-order marks and signs of damage


@pytest.mark.parametrize(
    ("name", "content", "documents"),
    [
        ("a.txt", b"one\n", ["one\n"]),
        ("a.jsonl", ROWS, ["one", "two"]),
        ("a.json", b'[{"text": "one"}]', ["one"]),
        ("a.csv", TABLE, ["one", "two"]),
        ("quoted.csv", b'"text",n\n"one",1\n', ["one"]),
        ("a.txt.gz", b"one", ["one"]),
    ],
)
def test_byte_order_mark_is_no_text(name: str, content: bytes, documents: list[str], tmp_path: Path) -> None:
    marked = codecs.BOM_UTF8 + content
    assert read(put(tmp_path, name, gzipped(marked) if name.endswith(".gz") else marked)) == documents


def test_byte_order_marks_of_files_put_together_are_no_text(tmp_path: Path) -> None:
    assert read(put(tmp_path, "a.jsonl", 2 * (codecs.BOM_UTF8 + ROWS))) == ["one", "two"] * 2


def test_mark_inside_a_text_stays(tmp_path: Path) -> None:
    assert read(put(tmp_path, "a.txt", "one\ufefftwo".encode())) == ["one\ufefftwo"]


@pytest.mark.parametrize(
    ("name", "content", "sign"),
    [
        ("a.txt", "UTF-16 without a mark".encode("utf-16-le"), "50% of a document is NUL"),
        ("a.txt", b"old tar" + bytes(9000), "100% of a document is NUL"),
        ("a.jsonl", json.dumps({"text": "caf\ufffd" * 9}).encode(), r"25% of a document is U\+FFFD"),
        ("a.parquet", parquet(["fine", "\0\0\0\0"]), "100% of a document is NUL"),
    ],
)
def test_text_full_of_what_no_text_is_full_of_is_told_once(
    name: str, content: bytes, sign: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path, name, content)
    put(tmp_path, f"b.{name}", content)
    assert len(read(tmp_path / "*")) >= 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith(f"WARNING: {tmp_path / name}: ")
    assert re.search(sign, line)


@pytest.mark.parametrize("text", ["x" * 1000 + 5 * "\0", "a string of C ends with \0"])
def test_a_few_nuls_are_nothing_to_tell(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert read(put(tmp_path, "a.txt", text.encode())) == [text]
    assert capsys.readouterr().err == ""


# No type is guessed

LOOKS_LIKE_ANOTHER_TYPE = ["007", "1e5", "True", "null", "NA", "nan", "2020-01-01", "2020-01-01 10:00:00", "", " 1 "]


def write_csv(folder: Path, texts: list[str]) -> Path:
    with open(folder / "a.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["n", "text", "x"], *([i, text, ""] for i, text in enumerate(texts))])
    return folder / "a.csv"


def write_jsonl(folder: Path, texts: list[str]) -> Path:
    return put(folder, "a.jsonl", "".join(json.dumps({"n": 1, "text": text}) + "\r\n" for text in texts).encode())


def write_json(folder: Path, texts: list[str]) -> Path:
    return put(folder, "a.json", json.dumps([{"text": text} for text in texts], ensure_ascii=False, indent=1).encode())


def write_indented(folder: Path, texts: list[str]) -> Path:
    return put(folder, "b.jsonl", "\n".join(json.dumps({"text": text}, indent=2) for text in texts).encode())


def write_parquet(folder: Path, texts: list[str]) -> Path:
    return put(folder, "a.parquet", parquet(texts))


WRITERS = pytest.mark.parametrize("write", [write_csv, write_jsonl, write_json, write_indented, write_parquet])


@WRITERS
@given(texts=st.lists(st.sampled_from(LOOKS_LIKE_ANOTHER_TYPE) | ANY_TEXT, min_size=1))
@example(texts=LOOKS_LIKE_ANOTHER_TYPE)
@example(texts=["2020-01-01"] * 3)
@example(texts=['a "quoted", text\r\nof lines\r', "\ufeff", "{", "[]"])
def test_every_text_is_read_as_it_was_written(
    write: Callable[[Path, list[str]], Path], texts: list[str], tmp_path: Path
) -> None:
    assert read(write(tmp_path, texts)) == texts


@WRITERS
def test_texts_that_change_their_looks_late(write: Callable[[Path, list[str]], Path], tmp_path: Path) -> None:
    texts = ["abc"] * 12_000 + ["7"] * 12_000
    assert read(write(tmp_path, texts)) == texts


def test_other_columns_may_change_their_type_and_new_ones_may_come(tmp_path: Path) -> None:
    rows = [
        {"text": f"t{i}", "n": i if i < 9000 else "many", **({"new": 1} if i > 9000 else {})} for i in range(12_000)
    ]
    assert read(put(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)).encode())) == [row["text"] for row in rows]


def test_text_longer_than_the_limit_of_the_csv_module(tmp_path: Path) -> None:
    assert read(put(tmp_path, "a.csv", b"text\n" + b"x" * 200_000)) == ["x" * 200_000]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "2020-01-01"}\n{"text": 7}\n', r"a column of text .* not of int \(row 2\)"),
        ("a.jsonl", b'{"text": ["a"]}\n', r"a column of text .* not of list \(row 1\)"),
        ("a.jsonl", b'{"text": {"a": 1}}\n', r"a column of text .* not of dict \(row 1\)"),
        ("a.jsonl", b'{"text": true}\n', r"a column of text .* not of bool \(row 1\)"),
        ("a.jsonl", b"7\n", "an object in row 1 of .*, not int; write one object per line"),
        ("a.jsonl", b"null\n" + ROWS, "an object in row 1 of .*, not NoneType"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "whole characters in row 1 .*, not half a surrogate pair"),
        (
            "a.jsonl",
            ROWS + b"{oops\n",
            "a.jsonl: expected a readable json source, and line 3 is not: Expecting property",
        ),
        ("a.jsonl", ROWS + b'{"text": "cut\n', "and line 3 is not: "),
        ("a.json", b'[{"text": "one"},\n{"text"', "and line 2 is not: "),
        ("a.parquet", parquet([b"one"]), "a column of text .* not of binary"),
        ("a.parquet", parquet([["a"]]), "a column of text .* not of list"),
        ("a.csv", b"text,n\na,b,c\n", "2 fields, as in the header, in the row that ends in line 2, not 3"),
        ("a.csv", b"text,n\nbroken\nline,1\n", "2 fields, as in the header, in the row that ends in line 2, not 1"),
        ("a.csv", b'text,n\n"a,1\nb,2\n', "a.csv: expected a readable csv source"),
        ("a.csv", b"body;text\na;b\n", "--text-key text: expected a column of .*, which has: body;text"),
    ],
)
def test_what_is_no_text_is_never_made_one(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        read(put(tmp_path, name, content))


def test_dictionary_of_texts_is_text(tmp_path: Path) -> None:
    texts = pyarrow.array(["one", "two", "one"]).dictionary_encode()
    assert read(put(tmp_path, "a.parquet", parquet(texts))) == ["one", "two", "one"]


def test_column_that_comes_late_is_missed_only_in_a_whole_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "ROWS_PER_BATCH", 2)
    assert read(put(tmp_path, "a.jsonl", b'{"a": "x"}\n' + ROWS)) == ["", "one", "two"]
    with pytest.raises(ConfigError, match=r"--text-key text: expected a column of .*, which has: a, b; name one"):
        read(put(tmp_path, "a.jsonl", b'{"a": "x"}\n{"b": "x"}\n' + ROWS))


def test_hub_column_of_mixed_types_is_refused(tmp_path: Path) -> None:
    # `datasets` would give the JSON text of each value: "2020-01-01" with its quotes.
    put(tmp_path, "train.jsonl", b'{"text": "2020-01-01"}\n{"text": 7}\n')
    with pytest.raises(ConfigError, match=r"--text-key text: expected a column of text in .* not of "):
        read(tmp_path, hub=True)


def test_hub_csv_keeps_texts_that_pandas_takes_for_missing(tmp_path: Path) -> None:
    put(tmp_path, "train.csv", b"text,n\nnull,1\nNA,2\none,3\n")
    assert read(tmp_path, hub=True) == ["null", "NA", "one"]


def test_hub_csv_never_gives_the_text_of_another_column(tmp_path: Path) -> None:
    put(tmp_path, "train.csv", b"text,n\nmine,theirs,\nmine,theirs,\n")
    assert read(tmp_path, hub=True) == ["mine", "mine"]


ENDINGS = (".txt", ".jsonl", ".json", ".csv", ".parquet", ".arrow", ".txt.gz", ".jsonl.xz", ".csv.zst", ".txt.bz2")
SOUND = [
    ROWS,
    TABLE,
    parquet(["one"]),
    arrow(pyarrow.ipc.new_file),
    gzipped(ROWS),
    zstd(TABLE),
    lzma.compress(ROWS),
]


@settings(max_examples=300)
@given(
    ending=st.sampled_from(ENDINGS),
    content=st.binary(max_size=300) | st.sampled_from(SOUND),
    place=st.integers(0, 300),
    cut=st.integers(0, 9),
    put_in=st.binary(max_size=4),
)
@example(ending=".jsonl", content=b"[" * 100_000, place=0, cut=0, put_in=b"")
@example(ending=".txt", content=b'{"a":' * 100_000, place=0, cut=0, put_in=b"")
@example(ending=".jsonl", content=b'{"n": ' + b"1" * 5000 + b"}", place=0, cut=0, put_in=b"")
def test_any_bytes_are_read_or_refused(
    ending: str, content: bytes, place: int, cut: int, put_in: bytes, tmp_path: Path
) -> None:
    path = put(tmp_path, f"a{ending}", content[:place] + put_in + content[place + cut :])
    refusal = str(path)
    try:
        assert all(isinstance(text, str) for text in read(path))
    except ConfigError as error:
        refusal = str(error)
    assert str(path) in refusal
    assert "\n" not in refusal


# As a command


def test_command_says_how_to_insist(model: str, tmp_path: Path, tool: Tool, capsys: pytest.CaptureFixture[str]) -> None:
    source = put(tmp_path, "a.txt", ROWS)
    arguments = ("--input", source, "--tokenizer-model", model, "--output-prefix", tmp_path / "out")
    assert tool("preprocess_data", *arguments) == 2
    assert "--format text" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["a.txt"]
    assert tool("preprocess_data", *arguments, "--format", "json") == 0
    assert "2 documents" in capsys.readouterr().out
    assert tool("preprocess_data", *arguments, "--format", "text", "--overwrite") == 0
    assert "1 documents" in capsys.readouterr().out
