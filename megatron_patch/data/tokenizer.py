"""Training a sentencepiece model, and turning texts into the ids that Megatron's own tokenizer would give."""

import io
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import sentencepiece

from megatron_patch.data.corpus import Corpus
from megatron_patch.data.progress import Progress
from megatron_patch.errors import ConfigError
from megatron_patch.files.output import OutputFiles

TRAINING_THREADS = 16
"""Threads inside sentencepiece; fixed, since a unigram model depends on it (floats are summed per thread)."""

NOT_LEARNT = re.compile(r"[\n\t\u2585]")
"""What parts text into the lines that sentencepiece learns from.

It drops every line with U+2585, its stand-in for rare characters, without a word (of all of Unicode only this one, in
0.2.3), and in other versions every line with a tab, its mark of a boundary.
"""

LINE_CHARACTERS = 1 << 28
"""Longest line that sentencepiece is given; it drops lines of more bytes than its limit of 31 bits allows."""


@dataclass(frozen=True)
class Tokenizer:
    """A loaded tokenizer; `encode` may be called from several threads at a time.

    Attributes:
        vocab_size: ids are below this; it decides the dtype of the dataset, as in Megatron.
        eod: id that ends a document, or None if the tokenizer has none.
        encode: texts -> one int array [tokens] per text.
    """

    vocab_size: int
    eod: int | None
    encode: Callable[[list[str]], list[np.ndarray]]


def load_tokenizer(path: str) -> Tokenizer:
    """Load a sentencepiece model file, or a folder that holds a Hugging Face tokenizer.

    The ids equal those of Megatron's ``--tokenizer-type SentencePieceTokenizer`` or ``HuggingFaceTokenizer`` with
    ``--tokenizer-model path`` and its default options.

    Raises:
        ConfigError: nothing there, or not a tokenizer.
    """
    if os.path.isdir(path):
        return _load_hugging_face(path)
    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromFile(path)
    except (OSError, RuntimeError, ValueError):
        expected = "a sentencepiece model" if os.path.exists(path) else "an existing file or folder"
        raise ConfigError("--tokenizer-model", path, expected, "make one with megatron-patch tokenizer") from None

    def encode(texts: list[str]) -> list[np.ndarray]:
        encoded: list[np.ndarray] = model.encode(texts, return_type="numpy", num_threads=1)
        return encoded

    return Tokenizer(model.get_piece_size(), model.eos_id() if model.eos_id() >= 0 else None, encode)


def _load_hugging_face(folder: str) -> Tokenizer:
    # Our threads are the parallelism; the library's own pool would take every core whatever --workers says.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library raises anything from KeyError to its own Rust exceptions
        raise ConfigError(
            "--tokenizer-model",
            folder,
            "a folder with a Hugging Face tokenizer",
            f"check it ({' '.join(str(error).split())[:300]})",
        ) from None

    def encode(texts: list[str]) -> list[np.ndarray]:
        encoded = tokenizer(texts, verbose=False, return_attention_mask=False, return_token_type_ids=False)
        return [np.array(ids, dtype=np.int32) for ids in encoded["input_ids"]]

    encode(["x"])  # sets truncation and padding; later calls find them set and change nothing, so threads may share it
    eod = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id  # Megatron's order
    return Tokenizer(len(tokenizer), eod, encode)


def train_tokenizer(
    corpus: Corpus,
    output_prefix: str,
    *,
    vocab_size: int,
    model_type: str = "bpe",
    character_coverage: float = 0.9995,
    sample_documents: int | None = None,
    workers: int | None = None,
    overwrite: bool = False,
) -> str:
    """Train a lossless sentencepiece model, write it as ``<output_prefix>.model`` and return a line of figures.

    Lossless: decode(encode(text)) == text for every text without U+2581, sentencepiece's own stand-in for the space.
    Ids: 0 <unk>, 1 <s>, 2 </s> (Megatron's end of document), 3 <pad>, then 256 bytes, then the learnt pieces. Newlines,
    tabs and U+2585 are bytes. The same documents and settings give the same file, whatever `workers` is.

    Args:
        corpus: the documents.
        output_prefix: the file's name without ``.model``.
        vocab_size: number of ids, all kinds together.
        model_type: ``"bpe"`` or ``"unigram"``.
        character_coverage: share of the characters that get ids of their own, 0.98 to 1; the rest are spelt in bytes.
        sample_documents: train on a uniform sample of this many documents, the same one every time; None: on all.
        workers: CPU cores to use; None: all.
        overwrite: replace an existing model.

    Raises:
        ConfigError: a bad setting, no text, too little text for `vocab_size` (names the largest possible), or the
            errors of `OutputFiles` and `open_corpus`.
    """
    if vocab_size < 1:
        raise ConfigError("--vocab-size", vocab_size, "an integer >= 1", "4096 suits a few megabytes of text")
    if not 0.98 <= character_coverage <= 1:
        raise ConfigError(
            "--character-coverage", character_coverage, "a number from 0.98 to 1", "0.9995 is a good value"
        )
    if sample_documents is not None and sample_documents < 1:
        raise ConfigError(
            "--sample-documents", sample_documents, "an integer >= 1", "leave it out to use all documents"
        )
    workers = check_workers(workers)
    path = f"{output_prefix}.model"
    with OutputFiles([path], overwrite) as files, Progress("reading", corpus.total_documents) as progress:
        documents = sample(_counted(corpus, progress), sample_documents)
        if not documents:
            raise ConfigError("--input", corpus.spec, "at least one document that is not empty", "check the input")
        read_seconds = progress.seconds
        try:
            model, learnt = _train(documents, vocab_size, model_type, character_coverage, workers)
        except RuntimeError as error:
            raise _training_error(corpus.spec, vocab_size, str(error)) from None
        with open(files.temporary(path), "wb") as file:
            file.write(model)
        files.publish()
        characters = sum(map(len, documents))
        return (
            f"{path}: {vocab_size} ids ({model_type}) from {len(documents)} documents, learnt from {learnt} of their "
            f"{characters} characters (line ends, tabs and U+2585 are spelt in bytes); "
            f"reading {read_seconds:.1f} s, training {progress.seconds - read_seconds:.1f} s"
        )


def check_workers(workers: int | None) -> int:
    """Return `workers`, or the number of cores this process may use when it is None.

    Raises:
        ConfigError: it is below 1.
    """
    if workers is not None and workers < 1:
        raise ConfigError("--workers", workers, "an integer >= 1", "leave it out to use every core")
    return workers or len(os.sched_getaffinity(0))


def sample(documents: Iterable[str], size: int | None) -> list[str]:
    """Return a uniform sample of `size` documents in one pass, always the same one; all of them if `size` is None.

    Reservoir sampling (Vitter 1985, algorithm R): document number n replaces a random one of the sample with
    probability size/n.

    >>> sample("abcdef", 10) == list("abcdef"), len(sample("abcdef", 2))
    (True, 2)
    """
    if size is None:
        return list(documents)
    generator = random.Random(0)
    chosen: list[str] = []
    for count, document in enumerate(documents, start=1):
        if count <= size:
            chosen.append(document)
        elif (place := generator.randrange(count)) < size:
            chosen[place] = document
    return chosen


def _counted(corpus: Corpus, progress: Progress) -> Iterator[str]:
    """Yield the documents that are not empty, and count all."""
    for batch in corpus.batches:
        progress.advance(documents=len(batch))
        yield from filter(None, batch)


def learnable_lines(document: str) -> Iterator[str]:
    """Yield the parts of a document that sentencepiece learns from, without empty ones.

    >>> list(learnable_lines("50% \u2585\u2585 done\\n\\n\\tx"))
    ['50% ', ' done', 'x']
    """
    for line in NOT_LEARNT.split(document):
        for begin in range(0, len(line), LINE_CHARACTERS):
            yield line[begin : begin + LINE_CHARACTERS]


def _train(
    documents: list[str], vocab_size: int, model_type: str, character_coverage: float, workers: int
) -> tuple[bytes, int]:
    """Return the model, and how many characters it was learnt from."""
    learnt = 0

    def lines() -> Iterator[str]:
        nonlocal learnt
        for document in documents:
            for line in learnable_lines(document):
                learnt += len(line)
                yield line

    model = io.BytesIO()
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[:workers])  # inherited by the threads of sentencepiece
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            character_coverage=character_coverage,
            # Lossless: no Unicode normalisation, no space added or removed, bytes for what has no id.
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            byte_fallback=True,
            allow_whitespace_only_pieces=True,  # indentation becomes one token
            pad_id=3,  # of its own: Megatron masks the loss on it, which must not hit </s>
            max_sentence_length=4 * LINE_CHARACTERS,  # in bytes; longer lines would be dropped without a word
            num_threads=TRAINING_THREADS,
            minloglevel=2,
        )
    finally:
        os.sched_setaffinity(0, cores)
    return model.getvalue(), learnt


def _training_error(spec: str, vocab_size: int, message: str) -> ConfigError:
    if largest := re.search(r"too high .*<= (\d+)", message):
        return ConfigError(
            "--vocab-size", vocab_size, f"at most {largest[1]} for this much text", "lower it or give more documents"
        )
    if smallest := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return ConfigError(
            "--vocab-size",
            vocab_size,
            f"more than {smallest[1]} (256 bytes, 4 special ids and the characters)",
            "raise it",
        )
    return ConfigError("--input", spec, "text that sentencepiece can learn from", f"it says: {message}")
