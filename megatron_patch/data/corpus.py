"""Where documents come from: the Python standard library, files, saved datasets, the Hugging Face hub.

A document is a str. Whatever the source, documents come in one fixed order, so the same input always gives the same
tokens. `datasets` reads every format but plain text, and is imported only when it is needed: it costs seconds.
"""

import glob
import os
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_patch.errors import ConfigError

COMPRESSIONS = (".gz", ".xz", ".bz2", ".zst")
"""Endings of compressed files; .zst needs the package `zstandard`. Not .zip: it holds any number of files."""

FORMATS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".arrow": "arrow",
}
"""File ending (compression taken off) -> the loader of `datasets` that reads it. Every other file is plain text."""

ROWS_PER_BATCH = 1000


@dataclass(frozen=True)
class Corpus:
    """Documents in reading order.

    Attributes:
        spec: the source as the user named it.
        batches: lists of documents; a missing or undecodable document is an empty str.
        total_documents: how many documents there will be, where that is known without reading them.
    """

    spec: str
    batches: Iterator[list[str]]
    total_documents: int | None = None


def open_corpus(spec: str, *, text_key: str = "text", document_per_line: bool = False, hub: bool = False) -> Corpus:
    """Find the documents that `spec` names; they are read while `Corpus.batches` is consumed.

    Args:
        spec: ``stdlib`` (the .py files of the running Python's standard library), a file, a glob, a folder written by
            `datasets.Dataset.save_to_disk`, or with `hub` the name of a hub dataset, as ``NAME`` or ``NAME:CONFIG``.
        text_key: the column that holds the text; plain text files have none.
        document_per_line: every line of a plain text file is a document; otherwise a file is one document.
        hub: `spec` is a name on the Hugging Face hub; its split ``train`` is streamed, not stored.

    Raises:
        ConfigError: nothing matches `spec`; and, while reading, a file that is corrupt or lacks the column.
    """
    if hub:
        return Corpus(spec, _hub_documents(spec, text_key))
    if spec == "stdlib":
        files = stdlib_files()
        return Corpus(spec, _guarded(spec, ([_read_source_file(file)] for file in files)), len(files))
    if os.path.isdir(spec):
        return _saved_dataset(spec, text_key)
    files = [spec] if os.path.exists(spec) else sorted(glob.glob(spec, recursive=True))
    files = [file for file in files if not os.path.isdir(file)]
    if not files:
        raise ConfigError(
            "--input", spec, "an existing file, folder or glob, or 'stdlib'", "check the path (--hub for a hub name)"
        )
    only_whole_texts = not document_per_line and all(file_format(file) == "text" for file in files)
    return Corpus(spec, _file_documents(files, text_key, document_per_line), len(files) if only_whole_texts else None)


def stdlib_files() -> list[str]:
    """Return the sorted .py files of the standard library, without installed packages: about 1,700 files, 31 MB."""
    root = sysconfig.get_paths()["stdlib"]
    files = glob.glob("**/*.py", root_dir=root, recursive=True)
    installed = ("site-packages" + os.sep, "dist-packages" + os.sep)
    return [os.path.join(root, file) for file in sorted(files) if not file.startswith(installed)]


def file_format(path: str) -> str:
    """Return the loader for a file by its ending.

    >>> file_format("a/b.jsonl.gz"), file_format("notes.md")
    ('json', 'text')
    """
    stem, ending = os.path.splitext(path)
    if ending in COMPRESSIONS:
        ending = os.path.splitext(stem)[1]
    return FORMATS.get(ending, "text")


def _read_source_file(path: str) -> str:
    """Read a Python file in the encoding it declares; the few that are broken on purpose (for tests) become empty."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):
        return ""


def _file_documents(files: Sequence[str], text_key: str, document_per_line: bool) -> Iterator[list[str]]:
    for file in files:
        if file_format(file) == "text":
            yield from _guarded(file, _text_documents(file, document_per_line))
        else:
            yield from _guarded(file, _text_column(file, text_key, _file_tables(file, text_key)))


def _text_documents(file: str, document_per_line: bool) -> Iterator[list[str]]:
    import fsspec

    # newline="" keeps \r\n, as the other formats do; as a separator of documents any line end will do.
    newline = None if document_per_line else ""
    compression = "infer" if file.endswith(COMPRESSIONS) else None
    with fsspec.open(file, "rt", encoding="utf-8", newline=newline, compression=compression) as stream:
        if not document_per_line:
            yield [stream.read()]
            return
        while lines := stream.readlines(1 << 20):
            yield [line.removesuffix("\n") for line in lines]


def _file_tables(file: str, text_key: str) -> Iterator[Any]:
    """Yield the rows of one file as Arrow tables."""
    options: dict[str, Any] = {}
    if file_format(file) == "parquet":
        import pyarrow.parquet

        if text_key in pyarrow.parquet.read_schema(file).names:
            options["columns"] = [text_key]  # the others need not even be read
    if file_format(file) == "csv":
        options["keep_default_na"] = False  # or a text such as "null" would count as missing
    loader = _datasets().load_dataset
    try:
        # It takes file names for globs.
        dataset = loader(file_format(file), data_files=[glob.escape(file)], split="train", streaming=True, **options)
    except StopIteration:
        return  # what `datasets` 5 raises for a JSON file without a row
    yield from dataset.with_format("arrow").iter(ROWS_PER_BATCH)


def _saved_dataset(folder: str, text_key: str) -> Corpus:
    datasets = _datasets()
    try:
        dataset = datasets.load_from_disk(folder)
    except FileNotFoundError:
        raise ConfigError(
            "--input",
            folder,
            "a folder written by save_to_disk",
            "give a glob for a folder of files, such as 'folder/*.jsonl'",
        ) from None
    except Exception as error:
        raise _unreadable(folder, error) from error
    if isinstance(dataset, datasets.DatasetDict):
        splits = ", ".join(os.path.join(folder, name) for name in dataset)
        raise ConfigError("--input", folder, "one split of the saved datasets", f"give one of {splits}")
    tables = dataset.with_format("arrow").iter(ROWS_PER_BATCH)
    return Corpus(folder, _guarded(folder, _text_column(folder, text_key, tables)), len(dataset))


def _hub_documents(spec: str, text_key: str) -> Iterator[list[str]]:
    name, _, config = spec.partition(":")
    try:
        dataset = _datasets().load_dataset(name, config or None, split="train", streaming=True)
    except Exception as error:
        raise ConfigError(
            "--input", spec, "a dataset on the hub with a split 'train'", f"check name and network ({_one_line(error)})"
        ) from error
    yield from _guarded(spec, _text_column(spec, text_key, dataset.with_format("arrow").iter(ROWS_PER_BATCH)))


def _text_column(source: str, text_key: str, tables: Iterable[Any]) -> Iterator[list[str]]:
    for table in tables:
        if text_key not in table.column_names:
            columns = ", ".join(table.column_names)
            raise ConfigError(
                "--text-key", text_key, f"a column of {source}, which has: {columns}", "name one of these"
            )
        texts = ["" if text is None else text for text in table.column(text_key).to_pylist()]
        wrong = next((text for text in texts if not isinstance(text, str)), None)
        if wrong is not None:
            raise ConfigError(
                "--text-key",
                text_key,
                f"a column of text in {source}, not of {type(wrong).__name__}",
                "name another column",
            )
        yield texts


def _guarded(source: str, batches: Iterable[list[str]]) -> Iterator[list[str]]:
    """Yield `batches`, turning whatever the reading library raises into one line that names the source."""
    try:
        yield from batches
    except ConfigError:
        raise
    except Exception as error:  # gzip, lzma, Arrow, pandas and fsspec have no base class in common
        raise _unreadable(source, error) from error


def _unreadable(source: str, error: Exception) -> ConfigError:
    kind = file_format(source) if os.path.isfile(source) else "dataset"
    return ConfigError(
        "--input", source, f"a readable {kind} source", f"repair or leave out this file ({_one_line(error)})"
    )


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _datasets() -> Any:
    import datasets

    # Its errors reach the user as ConfigError; its own bars and log lines would only tear ours apart.
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    return datasets
