"""A file on the disk before it is read: the format that its name means, and its bytes, once they can be text at all."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from megatron_patch.errors import ConfigError


def _zstd(raw: BinaryIO) -> Any:
    import pyarrow

    # Not the package `zstandard`: Arrow's reads on after the first frame, and tells a file that is cut off.
    return pyarrow.CompressedInputStream(raw, "zstd")


COMPRESSIONS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": gzip.open,
    ".xz": lzma.open,
    ".bz2": bz2.open,
    ".zst": _zstd,
}
"""Endings of compressed files -> what reads them. Not .zip: it holds any number of files."""

FORMATS = {
    ".jsonl": "json",
    ".jsonlines": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".arrow": "arrow",
}
"""File ending (compression taken off, in small letters) -> format. Every other file is plain text."""

_UNPACK = "unpack it and give a glob of the files it held"
_DECOMPRESS = "decompress it, or compress it with gzip, xz, bzip2 or zstd"
_REFUSED_ENDINGS = {
    **dict.fromkeys((".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".tzst", ".zip", ".7z", ".rar"), ("an archive", _UNPACK)),
    **dict.fromkeys(
        (".lz4", ".lzma", ".lz", ".lzo", ".br", ".z", ".sz", ".snappy"), ("a compression not known here", _DECOMPRESS)
    ),
    **dict.fromkeys((".tsv", ".tab"), ("a table by its name", "make it .csv or .jsonl, or insist with --format text")),
}

_REFUSED_BYTES = (
    (257, b"ustar", "a tar archive", _UNPACK),
    (0, b"PK\x03\x04", "a zip archive, as the files of office programs are too", _UNPACK),
    (0, b"PK\x05\x06", "a zip archive without a file", _UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (0, b"Rar!\x1a\x07", "a rar archive", _UNPACK),
    (0, b"\x1f\x8b", "compressed with gzip", "let its name end in .gz"),
    (0, b"\xfd7zXZ\x00", "compressed with xz", "let its name end in .xz"),
    (4, b"1AY&SY", "compressed with bzip2", "let its name end in .bz2"),
    (0, b"\x28\xb5\x2f\xfd", "compressed with zstd", "let its name end in .zst"),
    (0, b"\x04\x22\x4d\x18", "compressed with lz4", _DECOMPRESS),
    (0, b"\x1f\x9d", "compressed with compress", _DECOMPRESS),
    (0, b"PAR1", "a parquet file", "let its name end in .parquet, or give --format parquet"),
    (0, b"ARROW1", "an Arrow file", "let its name end in .arrow, or give --format arrow"),
    (0, b"%PDF-", "a PDF document", "extract its text"),
    (0, b"SQLite format 3\x00", "an SQLite database", "extract its text"),
    (0, codecs.BOM_UTF32_LE, "UTF-32", "convert it: iconv -f UTF-32 -t UTF-8"),
    (0, codecs.BOM_UTF32_BE, "UTF-32", "convert it: iconv -f UTF-32 -t UTF-8"),
    (0, codecs.BOM_UTF16_LE, "UTF-16", "convert it: iconv -f UTF-16 -t UTF-8"),
    (0, codecs.BOM_UTF16_BE, "UTF-16", "convert it: iconv -f UTF-16 -t UTF-8"),
)
"""Offset [bytes] and value of what no text has there, what it means, and what to do."""

_BUFFER_BYTES = 1 << 16


def format_of(path: str) -> str:
    """Return the format of a file by its ending, in whatever case.

    >>> format_of("a/b.jsonl.gz"), format_of("DATA.JSONL"), format_of("notes.md")
    ('json', 'json', 'text')

    Raises:
        ConfigError: the ending is that of an archive, or of another file that is not read here.
    """
    ending = _ending(os.path.splitext(path)[0] if is_compressed(path) else path)
    if ending in _REFUSED_ENDINGS:
        what, fix = _REFUSED_ENDINGS[ending]
        raise _no_text(path, what, fix)
    return FORMATS.get(ending, "text")


def is_compressed(path: str) -> bool:
    """Whether the name of a file says that it is compressed."""
    return _ending(path) in COMPRESSIONS


@contextmanager
def open_bytes(path: str) -> Iterator[io.BufferedReader]:
    """Open a file for reading, decompressed if its name says that it is compressed."""
    with open(path, "rb", buffering=0) as raw:
        content = COMPRESSIONS[_ending(path)](raw) if is_compressed(path) else raw
        with io.BufferedReader(content, _BUFFER_BYTES) as stream:
            yield stream


@contextmanager
def open_text(path: str, newline: str | None, *, insist: bool = True) -> Iterator[io.TextIOWrapper]:
    """Open a file of UTF-8 for reading; a byte-order mark is no part of its text.

    Args:
        path: the file.
        newline: as for `open`.
        insist: take it for what the caller says, even if it begins like JSON lines.

    Raises:
        ConfigError: its first bytes are not those of a text: an archive, another compression, another encoding.
    """
    with open_bytes(path) as stream:
        head = stream.peek()
        for offset, value, what, fix in _REFUSED_BYTES:
            if head.startswith(value, offset):
                raise _no_text(path, f"{what} by its first bytes", fix)
        if not insist and _begins_like_json_lines(head):
            raise _no_text(
                path,
                "JSON lines by its first line",
                "let its name end in .jsonl, or give --format json; --format text takes braces and all for text",
            )
        with io.TextIOWrapper(stream, encoding="utf-8-sig", newline=newline) as text:
            yield text


def _ending(path: str) -> str:
    return os.path.splitext(path.lower())[1]


def lacks_its_end(error: json.JSONDecodeError) -> bool:
    """Whether what was parsed is the beginning of a JSON value."""
    return error.msg.startswith("Unterminated") or error.pos >= len(error.doc.rstrip()) - 1


def _begins_like_json_lines(head: bytes) -> bool:
    """Whether the first line that is not blank is a JSON object, or the beginning of one that is longer than `head`."""
    first, line_end, _ = head.decode("utf-8-sig", errors="replace").lstrip().partition("\n")
    if not first.startswith("{"):
        return False
    try:
        json.loads(first)
    except json.JSONDecodeError as error:
        return not line_end and len(first) > 1 and lacks_its_end(error)
    return True


def _no_text(path: str, what: str, fix: str) -> ConfigError:
    return ConfigError("--input", path, f"UTF-8 text, JSON, CSV, parquet or Arrow, and this is {what}", fix)
