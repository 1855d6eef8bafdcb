"""Where documents come from: the Python standard library, files, saved datasets, the Hugging Face hub.

A document is a str. Whatever the source, documents come in one fixed order, so the same input always gives the same
tokens. `datasets` is imported only for saved datasets and the hub: it costs seconds.
"""

import glob
import itertools
import os
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from megatron_patch.data.opening import format_of, open_text
from megatron_patch.data.readers import READABLE, ROWS_PER_BATCH, TEXT_KINDS, read_documents, text_column
from megatron_patch.errors import ConfigError
from megatron_patch.files.whole import say

MARKS = {"\0": "NUL", "\ufffd": "U+FFFD, which stands for bytes that a program could not decode,"}
"""Characters that no text is full of."""

MARKS_SHARE, FEWEST_MARKS = 0.01, 4
"""Share of one of `MARKS` in a document above which it is told, and how many must be in it. assumed"""


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


def open_corpus(
    spec: str,
    *,
    text_key: str = "text",
    document_per_line: bool = False,
    hub: bool = False,
    format: str | None = None,
) -> Corpus:
    """Find the documents that `spec` names; they are read while `Corpus.batches` is consumed.

    Args:
        spec: ``stdlib`` (the .py files of the running Python's standard library), a file, a glob, a folder written by
            `datasets.Dataset.save_to_disk`, or with `hub` the name of a hub dataset, as ``NAME`` or ``NAME:CONFIG``.
        text_key: the column that holds the text; plain text files have none.
        document_per_line: every line of a plain text file is a document; otherwise a file is one document.
        hub: `spec` is a name on the Hugging Face hub; its split ``train`` is streamed, not stored.
        format: what every file of `spec` is, one of `readers.READABLE`; None: what its name says.

    Raises:
        ConfigError: nothing matches `spec`, or a file of it is none that is read here by its name or its first bytes;
            and, while reading, a file that is corrupt or lacks the column.
    """
    if format is not None and (hub or spec == "stdlib" or os.path.isdir(spec)):
        raise ConfigError("--format", format, "a file or a glob as --input", "leave the flag out")
    if format is not None and format not in READABLE:
        raise ConfigError("--format", format, f"one of {', '.join(READABLE)}", "name what the files are")
    if hub:
        return Corpus(spec, _Watch().over(spec, _hub_documents(spec, text_key)))
    if spec == "stdlib":
        files = stdlib_files()
        return Corpus(spec, _guarded(spec, "text", ([_read_source_file(file)] for file in files)), len(files))
    if os.path.isdir(spec):
        return _saved_dataset(spec, text_key)
    files = [spec] if os.path.exists(spec) else sorted(glob.glob(spec, recursive=True))
    files = [file for file in files if not os.path.isdir(file)]
    if not files:
        raise ConfigError(
            "--input", spec, "an existing file, folder or glob, or 'stdlib'", "check the path (--hub for a hub name)"
        )
    insist = format is not None
    kinds = {file: format or format_of(file) for file in files}
    for file, kind in kinds.items():
        # Before anything is read: a run of hours must not end at its last file. What is read from a pipe is gone.
        if kind in TEXT_KINDS and os.path.isfile(file):
            with _one_line_errors(file, kind), open_text(file, None, insist=insist or kind != "text"):
                pass
    only_whole_texts = not document_per_line and set(kinds.values()) == {"text"}
    watch = _Watch()

    def batches() -> Iterator[list[str]]:
        for file, kind in kinds.items():
            documents = read_documents(file, kind, text_key, document_per_line=document_per_line, insist=insist)
            yield from watch.over(file, _guarded(file, kind, documents))

    return Corpus(spec, batches(), len(files) if only_whole_texts else None)


def stdlib_files() -> list[str]:
    """Return the sorted .py files of the standard library, without installed packages: about 1,700 files, 31 MB."""
    root = sysconfig.get_paths()["stdlib"]
    files = glob.glob("**/*.py", root_dir=root, recursive=True)
    installed = ("site-packages" + os.sep, "dist-packages" + os.sep)
    return [os.path.join(root, file) for file in sorted(files) if not file.startswith(installed)]


def _read_source_file(path: str) -> str:
    """Read a Python file in the encoding it declares; the few that are broken on purpose (for tests) become empty."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):
        return ""


class _Watch:
    """Tells once, on stderr, of a document full of characters that no text is full of; it stays as it is."""

    def __init__(self) -> None:
        self._told = False

    def over(self, source: str, batches: Iterable[list[str]]) -> Iterator[list[str]]:
        """Yield the batches of documents of `source`, a file or what the user named."""
        for batch in batches:
            for text, (mark, name) in itertools.product(() if self._told else batch, MARKS.items()):
                count = text.count(mark)
                if not self._told and count >= FEWEST_MARKS and count > MARKS_SHARE * len(text):
                    share = count / len(text)
                    say(f"WARNING: {source}: {share:.0%} of a document is {name} and kept; is this text in UTF-8?")
                    self._told = True
            yield batch


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
        raise _unreadable(folder, "dataset", error) from error
    if isinstance(dataset, datasets.DatasetDict):
        splits = ", ".join(os.path.join(folder, name) for name in dataset)
        raise ConfigError("--input", folder, "one split of the saved datasets", f"give one of {splits}")
    tables = dataset.with_format("arrow").iter(ROWS_PER_BATCH)
    return Corpus(
        folder, _Watch().over(folder, _guarded(folder, "dataset", text_column(folder, text_key, tables))), len(dataset)
    )


def _hub_documents(spec: str, text_key: str) -> Iterator[list[str]]:
    name, _, config = spec.partition(":")
    try:
        builder = _datasets().load_dataset_builder(name, config or None)
        if hasattr(builder.config, "keep_default_na"):  # it is CSV, read by pandas
            builder.config.keep_default_na = False  # or a text such as "null" would count as missing
            builder.config.index_col = False  # or a row with a field too many would give its neighbour's text
        dataset = builder.as_streaming_dataset(split="train")
    except Exception as error:
        raise ConfigError(
            "--input", spec, "a dataset on the hub with a split 'train'", f"check name and network ({_one_line(error)})"
        ) from error
    tables = dataset.with_format("arrow").iter(ROWS_PER_BATCH)
    yield from _guarded(spec, "dataset", text_column(spec, text_key, tables))


def _guarded(source: str, kind: str, batches: Iterable[list[str]]) -> Iterator[list[str]]:
    with _one_line_errors(source, kind):
        yield from batches


@contextmanager
def _one_line_errors(source: str, kind: str) -> Iterator[None]:
    """Turn whatever the reading library raises into one line that names the source."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # gzip, lzma, csv and Arrow have no base class in common
        raise _unreadable(source, kind, error) from error


def _unreadable(source: str, kind: str, error: Exception) -> ConfigError:
    fix = "repair or leave out this file"
    if isinstance(error, UnicodeDecodeError):
        fix = "convert it to UTF-8 (iconv -f LATIN1 -t UTF-8, if that is what it is) or leave it out"
    return ConfigError("--input", source, f"a readable {kind} source", f"{fix} ({_one_line(error)})")


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _datasets() -> Any:
    import datasets

    # Its errors reach the user as ConfigError; its own bars and log lines would only tear ours apart.
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    return datasets
