"""From documents to Megatron's indexed datasets: tokenize in threads, write in order, show the result when complete."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from megatron_patch.data.corpus import Corpus
from megatron_patch.data.progress import Progress
from megatron_patch.data.tokenizer import Tokenizer, check_workers
from megatron_patch.errors import ConfigError
from megatron_patch.files.output import OutputFiles
from megatron_patch.upstream.datasets import indexed_dataset_builder

SPLITS = ("train", "valid", "test")
CHARACTERS_PER_TASK = 1 << 18
"""Text that a thread takes at a time: about 0.1 s of work, so that all threads end together."""


class Encoded(NamedTuple):
    """One document, ready to be written: number of its split, ids [tokens], bytes of UTF-8."""

    split: int
    ids: np.ndarray
    text_bytes: int


@dataclass
class Written:
    """What went into one dataset: documents and tokens (counts), text (bytes of UTF-8)."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0

    def add(self, document: Encoded) -> None:
        """Count one document."""
        self.documents += 1
        self.tokens += len(document.ids)
        self.text_bytes += document.text_bytes


def preprocess(
    corpus: Corpus,
    tokenizer: Tokenizer,
    output_prefix: str,
    *,
    append_eod: bool = False,
    workers: int | None = None,
    split_documents: str | None = None,
    overwrite: bool = False,
) -> str:
    """Write the corpus as Megatron indexed datasets and return the lines that sum them up.

    Without `split_documents` there is one, ``<output_prefix>.bin`` and ``.idx``; with it up to three, named
    ``<output_prefix>_train``, ``_valid`` and ``_test``. Documents keep the order of the corpus, each is one
    sequence, and empty ones are skipped and counted. The bytes do not depend on `workers`.

    Args:
        corpus: the documents.
        tokenizer: gives the ids and the dtype (uint16 below 65,500 ids, else int32).
        output_prefix: the dataset's name, as given to Megatron's ``--data-path``.
        append_eod: end every document with `Tokenizer.eod`.
        workers: threads that tokenize; None: one per core.
        split_documents: shares of train, valid and test, e.g. ``"98,1,1"``; see `split_of`.
        overwrite: replace existing files.

    Raises:
        ConfigError: a bad setting, an empty corpus or split, a full disk, or the errors of `OutputFiles` and
            `open_corpus`.
    """
    workers = check_workers(workers)
    if append_eod and tokenizer.eod is None:
        raise ConfigError("--append-eod", "given", "a tokenizer with an end-of-document id", "leave the flag out")
    eod = tokenizer.eod if append_eod else None
    bounds = [1.0] if split_documents is None else parse_split(split_documents)
    prefixes = {
        split: output_prefix if split_documents is None else f"{output_prefix}_{SPLITS[split]}"
        for split, (lower, upper) in enumerate(zip([0.0, *bounds], bounds, strict=False))
        if upper > lower
    }
    paths = [prefix + ending for ending in (".bin", ".idx") for prefix in prefixes.values()]
    written = {split: Written() for split in prefixes}
    builders: dict[int, Any] = {}

    def encode(texts: list[str]) -> tuple[int, list[Encoded]]:
        return len(texts), encode_documents(texts, tokenizer, eod, bounds)

    with OutputFiles(paths, overwrite) as files, Progress("tokenizing", corpus.total_documents) as progress:
        try:
            for read, documents in map_in_order(encode, tasks(corpus.batches), workers):
                # Not before there are tokens: the threads go on making them while Megatron is imported.
                if documents and not builders:
                    for split, prefix in prefixes.items():
                        bin_path = files.temporary(f"{prefix}.bin")
                        builders[split] = indexed_dataset_builder(bin_path, tokenizer.vocab_size)
                for document in documents:
                    builders[document.split].add_document(document.ids, [len(document.ids)])
                    written[document.split].add(document)
                progress.advance(read, sum(len(document.ids) for document in documents))
            for split, prefix in prefixes.items():
                if not written[split].documents:
                    raise _empty(corpus.spec, prefix, split_documents)
                builders[split].finalize(files.temporary(f"{prefix}.idx"))
            files.publish()
        except OSError as error:  # those of reading are ConfigErrors by now
            raise ConfigError(
                "--output-prefix", output_prefix, "a disk that takes the data", f"make room or choose another ({error})"
            ) from error
    return _summary(prefixes, written, progress)


def parse_split(text: str) -> list[float]:
    """Return the three shares of ``--split-documents`` as cumulative bounds in [0, 1].

    >>> parse_split("2,1,1")
    [0.5, 0.75, 1.0]

    Raises:
        ConfigError: not three numbers >= 0 with a sum above 0.
    """
    try:
        shares = [float(share) for share in text.split(",")]
    except ValueError:
        shares = []
    total = sum(shares)
    if len(shares) != len(SPLITS) or not min(shares) >= 0 or not 0 < total < float("inf"):
        raise ConfigError("--split-documents", text, "three numbers >= 0: train,valid,test", "write for example 98,1,1")
    return [sum(shares[: last + 1]) / total for last in range(len(SPLITS))]


def split_of(utf8: bytes, bounds: list[float]) -> int:
    """Return the number of the split a document belongs to, a function of its text alone.

    u = H(text) / 2^48 is uniform in [0, 1), H being the first 6 bytes of BLAKE2b; the split is the first whose bound is
    above u. Equal documents go to the same split, whatever else is in the corpus and in whatever order.
    """
    u = int.from_bytes(hashlib.blake2b(utf8, digest_size=6).digest(), "big") / 2**48
    return next(split for split, bound in enumerate(bounds) if u < bound)


def encode_documents(texts: list[str], tokenizer: Tokenizer, eod: int | None, bounds: list[float]) -> list[Encoded]:
    """Tokenize the texts that are not empty, ending each with `eod` unless it is None."""
    texts = [text for text in texts if text]
    documents = []
    for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
        if len(ids) == 0:
            continue  # a Hugging Face tokenizer may drop a text altogether
        utf8 = text.encode()
        documents.append(Encoded(split_of(utf8, bounds), ids if eod is None else np.append(ids, eod), len(utf8)))
    return documents


def tasks(batches: Iterable[list[str]]) -> Iterator[list[str]]:
    """Regroup documents into lists of about `CHARACTERS_PER_TASK` characters, in order."""
    task: list[str] = []
    characters = 0
    for batch in batches:
        for text in batch:
            task.append(text)
            characters += len(text) + 1  # empty documents count too, or a task could grow without end
            if characters >= CHARACTERS_PER_TASK:
                yield task
                task, characters = [], 0
    if task:
        yield task


def map_in_order[Item, Result](
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[Result]:
    """Like `map`, in `workers` threads; at most 16 * workers items are under way, which bounds the memory.

    Threads do, since sentencepiece and the Rust tokenizers release the interpreter lock; unlike processes they need no
    start, no copy of the text, and none is left behind by a kill.
    """
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) == 16 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _empty(spec: str, prefix: str, split_documents: str | None) -> ConfigError:
    if split_documents is None:
        return ConfigError("--input", spec, "at least one document that is not empty", "check the input")
    return ConfigError(
        "--split-documents", split_documents, f"a document for {prefix}", "give more documents or a larger share"
    )


def _summary(prefixes: dict[int, str], written: dict[int, Written], progress: Progress) -> str:
    lines = [
        f"{prefixes[split]}: {part.documents} documents, {part.tokens} tokens, {part.text_bytes} bytes of text"
        for split, part in written.items()
    ]
    documents = sum(part.documents for part in written.values())
    tokens = sum(part.tokens for part in written.values())
    text_bytes = sum(part.text_bytes for part in written.values())
    seconds = progress.seconds
    lines.append(
        f"total: {documents} documents, {tokens} tokens, {text_bytes} bytes of text, {seconds:.1f} s, "
        f"{tokens / seconds:.0f} tokens/s, {progress.documents - documents} empty documents skipped"
    )
    return "\n".join(lines)
