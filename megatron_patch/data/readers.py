"""The documents of one file in each format, as lists of str. Nothing guesses a type: a text is a text, or refused."""

import csv
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import batched
from typing import Any

from megatron_patch.data.opening import is_compressed, lacks_its_end, open_bytes, open_text
from megatron_patch.errors import ConfigError

TEXT_KINDS = ("text", "json", "csv")
"""Kinds of file that are text in UTF-8."""

READABLE = (*TEXT_KINDS, "parquet", "arrow")
"""What a file may hold, as for ``--format``."""

ROWS_PER_BATCH = 1000

_NOT_BLANK = re.compile(r"\S")


def read_documents(
    path: str, kind: str, text_key: str, *, document_per_line: bool = False, insist: bool = True
) -> Iterator[list[str]]:
    """Yield the documents of a file in lists; a missing one is an empty str.

    Args:
        path: the file.
        kind: one of `READABLE`.
        text_key: the column that holds the text; plain text has none.
        document_per_line: every line of plain text is a document; otherwise the file is one.
        insist: the user has said that it is of this kind, so that plain text may begin like JSON lines.

    Raises:
        ConfigError: the file is something else, or has no text under this key. A damaged file raises whatever the
            library raises that reads it.
    """
    if kind not in TEXT_KINDS:
        yield from text_column(path, text_key, _tables(path, kind, text_key))
        return
    newline = {"json": "\n", "csv": ""}.get(kind, None if document_per_line else "")
    # newline="" keeps \r\n, as the other formats do; as a separator of documents any line end will do.
    with open_text(path, newline, insist=insist or kind != "text") as stream:
        if kind == "json":
            yield from _json_documents(path, stream, text_key)
        elif kind == "csv":
            yield from _csv_documents(path, stream, text_key)
        elif document_per_line:
            while lines := stream.readlines(1 << 20):
                yield [line.removesuffix("\n") for line in lines]
        else:
            yield [stream.read()]


def _json_documents(path: str, stream: io.TextIOWrapper, text_key: str) -> Iterator[list[str]]:
    """Yield the texts of JSON lines, of a list, or of objects one after the other, however they are broken into lines.

    A row is an object, or a str, which is the text itself.
    """
    found = False
    row_number = 0
    for rows in batched(_json_rows(_json_values(path, stream)), ROWS_PER_BATCH):
        texts = []
        for row in rows:
            row_number += 1
            where = f"row {row_number} of {path}"
            if not isinstance(row, dict | str):
                raise ConfigError(
                    "--input", path, f"an object in {where}, not {type(row).__name__}", "write one object per line"
                )
            found = found or isinstance(row, str) or text_key in row
            text = row.get(text_key) if isinstance(row, dict) else row
            if text is not None and not isinstance(text, str):
                raise _wrong_type(text_key, path, f"{type(text).__name__} (row {row_number})")
            texts.append(text or "")
            try:
                texts[-1].encode()
            except UnicodeEncodeError:  # "\ud800" alone is JSON, but no character, and no tokenizer takes it
                raise ConfigError(
                    "--input", path, f"whole characters in {where}, not half a surrogate pair", "repair this row"
                ) from None
        if not found:
            raise _no_column(text_key, path, dict.fromkeys(key for row in rows for key in row))
        yield texts


def _json_rows(values: Iterator[Any]) -> Iterator[Any]:
    """Yield the values; if the first is a list, its items."""
    for number, value in enumerate(values):
        if number == 0 and isinstance(value, list):
            yield from value
        else:
            yield value


def _json_values(path: str, stream: io.TextIOWrapper) -> Iterator[Any]:
    decoder = json.JSONDecoder()
    first = True
    for number, read in enumerate(stream, start=1):
        line, place = read.removeprefix("\ufeff"), 0  # files put together with `cat` have marks in the middle
        while begin := _NOT_BLANK.search(line, place):
            try:
                value, place = decoder.raw_decode(line, begin.start())
            except json.JSONDecodeError as error:
                # A first value that only lacks its end goes on in the next lines; those of later ones may be gigabytes.
                if first and lacks_its_end(error) and (rest := stream.read()):
                    first = False
                    line += rest
                    continue
                line_number = number + error.lineno - 1
                raise ConfigError(
                    "--input",
                    path,
                    f"a readable json source, and line {line_number} is not: {error.msg}",
                    "repair or leave out this line",
                ) from None
            first = False
            yield value


def _csv_documents(path: str, stream: io.TextIOWrapper, text_key: str) -> Iterator[list[str]]:
    csv.field_size_limit(sys.maxsize)  # a field is a document, of any length
    rows = csv.reader(stream, strict=True)
    header = next(rows, None)
    if header is None:
        return
    if text_key not in header:
        raise _no_column(text_key, path, header)
    column = header.index(text_key)

    def texts() -> Iterator[str]:
        for row in rows:
            if row and len(row) != len(header):  # or texts would come from a neighbouring column
                raise ConfigError(
                    "--input",
                    path,
                    f"{len(header)} fields, as in the header, in the row that ends in line {rows.line_num}, "
                    f"not {len(row)}",
                    "put texts with commas or line ends between quotes",
                )
            if row:
                yield row[column]

    for batch in batched(texts(), ROWS_PER_BATCH):
        yield list(batch)


def _tables(path: str, kind: str, text_key: str) -> Iterator[Any]:
    """Yield the rows of a parquet or Arrow file as record batches."""
    import pyarrow
    import pyarrow.parquet

    with open_bytes(path) as stream:
        # Both formats are read from their ends, which no decompressor can do.
        source = io.BytesIO(stream.read()) if is_compressed(path) else stream
        if kind == "parquet":
            file = pyarrow.parquet.ParquetFile(source)
            columns = [text_key] if text_key in file.schema_arrow.names else None  # the others need not even be read
            yield from file.iter_batches(ROWS_PER_BATCH, columns=columns)
            return
        try:
            batches: Iterable[Any] = pyarrow.ipc.open_stream(source)
        except pyarrow.ArrowInvalid:
            source.seek(0)
            file = pyarrow.ipc.open_file(source)
            batches = (file.get_batch(i) for i in range(file.num_record_batches))
        for batch in batches:
            for begin in range(0, batch.num_rows, ROWS_PER_BATCH):
                yield batch.slice(begin, ROWS_PER_BATCH)


def text_column(source: str, text_key: str, tables: Iterable[Any]) -> Iterator[list[str]]:
    """Yield the texts of Arrow tables or record batches; `source` is what errors call them.

    Raises:
        ConfigError: there is no such column, or it is none of text.
    """
    for table in tables:
        if text_key not in table.schema.names:
            raise _no_column(text_key, source, table.schema.names)
        column = table.column(text_key)
        if not _is_text(column.type):
            raise _wrong_type(text_key, source, str(column.type))
        yield ["" if text is None else text for text in column.to_pylist()]


def _is_text(kind: Any) -> bool:
    import pyarrow

    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    # Null is the type of a column without a single value.
    tests = ("is_string", "is_large_string", "is_string_view", "is_null")
    return any(getattr(pyarrow.types, test)(kind) for test in tests)


def _no_column(text_key: str, source: str, columns: Iterable[str]) -> ConfigError:
    return ConfigError(
        "--text-key", text_key, f"a column of {source}, which has: {', '.join(columns)}", "name one of these"
    )


def _wrong_type(text_key: str, source: str, kind: str) -> ConfigError:
    return ConfigError("--text-key", text_key, f"a column of text in {source}, not of {kind}", "name another column")
