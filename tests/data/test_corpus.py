"""From text to Megatron's .bin and .idx: same ids as Megatron, same bytes every time, nothing half-written."""

import io
import json
import lzma
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_patch.data import preprocess as preprocess_module
from megatron_patch.data import tokenizer as tokenizer_module
from megatron_patch.data.corpus import open_corpus, stdlib_files
from megatron_patch.data.preprocess import map_in_order, parse_split, preprocess, split_of
from megatron_patch.data.tokenizer import Tokenizer, learnable_lines, load_tokenizer, sample, train_tokenizer
from megatron_patch.errors import ConfigError
from megatron_patch.files.output import OutputFiles
from tests.support.compressed import gzipped

Tool = Callable[..., int]


def dataset(prefix: object) -> Any:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    return IndexedDataset(str(prefix))


def ids_of(prefix: object) -> list[list[int]]:
    """The ids of every document of a dataset, copied: the arrays it gives away die with it."""
    opened = dataset(prefix)
    return [ids.tolist() for ids in opened[:]]


def megatron_tokenizer(kind: str, path: str) -> Any:
    """The tokenizer that Megatron builds for --tokenizer-type and --tokenizer-model with its default options."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    defaults = dict.fromkeys(("chat_template", "special_tokens", "metadata_path", "vocab_file", "merge_file"))
    switches = dict.fromkeys(
        (
            "tokenizer_sentencepiece_legacy",
            "tokenizer_hf_no_use_fast",
            "tokenizer_hf_no_include_special_tokens",
            "trust_remote_code",
            "pad_vocab_size",
        ),
        False,
    )
    given = {"tokenizer_type": kind, "tokenizer_model": path, "tokenizer_sentencepiece_ignore_extra_whitespaces": True}
    return build_tokenizer(Namespace(**defaults, **switches, **given))


def files_of(prefix: object) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def write_jsonl(path: Path, texts: list[Any]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture(scope="module")
def reference(jsonl: str, model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    prefix = tmp_path_factory.mktemp("reference") / "out"
    preprocess(open_corpus(jsonl), load_tokenizer(model), str(prefix), append_eod=True)
    return files_of(prefix)


# The same ids as Megatron


def test_megatron_reads_what_its_own_tokenizer_would_have_given(
    documents: list[str], jsonl: str, model: str, tmp_path: Path
) -> None:
    preprocess(open_corpus(jsonl), load_tokenizer(model), str(tmp_path / "out"), append_eod=True)
    tokenizer, written = megatron_tokenizer("SentencePieceTokenizer", model), dataset(tmp_path / "out")
    assert written.index.dtype is np.uint16
    assert list(written.document_indices) == list(range(len(documents) + 1))
    for text, ids in zip(documents, written[:], strict=True):
        assert list(ids) == [*tokenizer.tokenize(text), tokenizer.eod]
        assert tokenizer.detokenize([int(i) for i in ids[:-1]]) == text


def test_special_ids_are_where_megatron_looks_for_them(model: str) -> None:
    tokenizer = megatron_tokenizer("SentencePieceTokenizer", model)
    assert (tokenizer.unk, tokenizer.bos, tokenizer.eos, tokenizer.eod, tokenizer.pad) == (0, 1, 2, 2, 3)
    assert load_tokenizer(model).eod == tokenizer.eod
    assert load_tokenizer(model).vocab_size == tokenizer.vocab_size == 600


@pytest.fixture(scope="module")
def hugging_face(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Make the folder of a byte-level BPE tokenizer with these special tokens; it puts <s> before every text."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    def make(**special: str) -> str:
        bpe = tokenizers.ByteLevelBPETokenizer()
        bpe.train_from_iterator(documents[:5], vocab_size=1000, special_tokens=["<s>", "</s>"], show_progress=False)
        bpe._tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
        folder = tmp_path_factory.mktemp("hugging_face")
        PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **special).save_pretrained(folder)
        return str(folder)

    return make


def test_hugging_face_folder_gives_megatrons_ids(
    documents: list[str], jsonl: str, hugging_face: Callable[..., str], tmp_path: Path
) -> None:
    folder = hugging_face(eos_token="</s>")
    preprocess(open_corpus(jsonl), load_tokenizer(folder), str(tmp_path / "out"), append_eod=True, workers=2)
    tokenizer = megatron_tokenizer("HuggingFaceTokenizer", folder)
    for text, ids in zip(documents, ids_of(tmp_path / "out"), strict=True):
        assert ids == [*tokenizer.tokenize(text), tokenizer.eod]


def test_hugging_face_folder_without_an_end_is_refused_only_with_append_eod(
    hugging_face: Callable[..., str], jsonl: str, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(hugging_face())
    with pytest.raises(ConfigError, match=r"--append-eod .*end-of-document id"):
        preprocess(open_corpus(jsonl), tokenizer, str(tmp_path / "out"), append_eod=True)
    preprocess(open_corpus(jsonl), tokenizer, str(tmp_path / "out"))
    assert ids_of(tmp_path / "out")[0][0] == 0


def test_large_vocabulary_gets_four_bytes_a_token(jsonl: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer(70_000, 69_999, lambda texts: [np.array([65_536, 1], dtype=np.int32) for _ in texts])
    preprocess(open_corpus(jsonl), tokenizer, str(tmp_path / "out"), append_eod=True)
    assert ids_of(tmp_path / "out")[0] == [65_536, 1, 69_999]


# The tokenizer loses nothing and is the same every time


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def processor(request: pytest.FixtureRequest, documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("processor")
    corpus = open_corpus(write_jsonl(folder / "text.jsonl", documents[:3]))
    train_tokenizer(corpus, str(folder / "t"), vocab_size=500, model_type=request.param)
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "t.model"))


@settings(deadline=None, max_examples=150)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
@example("  leading, trailing  and \t\ttabs \n\n\r\n ")
@example("50% \u2585\u2585 \u2585")
@example("</s><s><unk><pad><0x41>\x00\ufeffe\u0301ﬁ")
def test_decoding_gives_the_text_back(processor: Any, text: str) -> None:
    assert processor.decode(processor.encode(text)) == text


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_same_text_gives_the_same_model_for_any_number_of_workers(
    model_type: str, documents: list[str], tmp_path: Path
) -> None:
    source = write_jsonl(tmp_path / "text.jsonl", documents[:3])
    for name, workers in (("a", 1), ("b", 2), ("c", None)):
        train_tokenizer(
            open_corpus(source), str(tmp_path / name), vocab_size=450, model_type=model_type, workers=workers
        )
    models = {(tmp_path / f"{name}.model").read_bytes() for name in "abc"}
    assert len(models) == 1


def test_lines_with_tabs_and_very_long_lines_are_learnt_from(tmp_path: Path) -> None:
    # sentencepiece by itself drops such lines without a word.
    source = write_jsonl(tmp_path / "t.jsonl", ["\tindented indented indented\n" * 20, "verylong " * 1000])
    train_tokenizer(open_corpus(source), str(tmp_path / "t"), vocab_size=310)
    pieces = load_pieces(str(tmp_path / "t.model"))
    assert {"▁indented", "▁verylong"} <= pieces


PROGRESS_BARS = "".join(f"downloading {i}% \u2585\u2585\u2585 of weights\n" for i in range(40))


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_reserved_character_parts_a_line_and_costs_nothing_of_it(model_type: str, tmp_path: Path) -> None:
    # U+2585 stands for rare characters inside sentencepiece, which drops the lines of a text that contain it.
    summaries = {}
    for name, text in (("bars", PROGRESS_BARS), ("parted", PROGRESS_BARS.replace("\u2585", "\n"))):
        source, prefix = write_jsonl(tmp_path / f"{name}.jsonl", [text]), str(tmp_path / name)
        summaries[name] = train_tokenizer(open_corpus(source), prefix, vocab_size=285, model_type=model_type)
    assert (tmp_path / "bars.model").read_bytes() == (tmp_path / "parted.model").read_bytes()
    assert set("downloading") <= load_pieces(str(tmp_path / "bars.model"))
    learnt = len(re.sub("[\n\u2585]", "", PROGRESS_BARS))
    assert f"learnt from {learnt} of their {len(PROGRESS_BARS)} characters" in summaries["bars"]
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "bars.model"))
    assert processor.decode(processor.encode(PROGRESS_BARS)) == PROGRESS_BARS


def test_sentencepiece_drops_no_line_with_any_other_character(capfd: pytest.CaptureFixture[str]) -> None:
    # It says so only in its log; if a version reserves another character, `NOT_LEARNT` needs it.
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    lines = [line for character in characters for line in learnable_lines(f"a{character}b")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=io.BytesIO(),
        vocab_size=300,
        model_type="char",
        character_coverage=0.98,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=0,
    )
    log = capfd.readouterr().err
    assert f"Loaded all {len(lines)} sentences" in log
    assert "Skipped" not in log


def test_lines_over_the_length_limit_are_learnt_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "LINE_CHARACTERS", 50)
    source = write_jsonl(tmp_path / "t.jsonl", ["mühsam " * 1000])
    summary = train_tokenizer(open_corpus(source), str(tmp_path / "t"), vocab_size=280)
    assert "learnt from 7000 of their 7000 characters" in summary
    assert "▁mühsam" in load_pieces(str(tmp_path / "t.model"))


def load_pieces(path: str) -> set[str]:
    processor = sentencepiece.SentencePieceProcessor(model_file=path)
    return {processor.id_to_piece(i) for i in range(processor.get_piece_size())}


@given(st.integers(0, 50), st.integers(1, 60))
def test_sample_has_the_asked_size_and_is_always_the_same(count: int, size: int) -> None:
    documents = [str(i) for i in range(count)]
    chosen = sample(documents, size)
    assert len(chosen) == len(set(chosen)) == min(count, size)
    assert set(chosen) <= set(documents)
    assert chosen == sample(iter(documents), size)


def test_sample_is_spread_over_the_whole_input() -> None:
    chosen = [int(text) for text in sample(map(str, range(10_000)), 1000)]
    assert 4600 < sum(chosen) / len(chosen) < 5400  # the mean's standard deviation is 87


# Every source of the same documents gives the same bytes


def write_texts(folder: Path, documents: list[str]) -> str:
    for i, text in enumerate(documents):
        (folder / f"{i:04d}.txt").write_text(text, encoding="utf-8", newline="")
    return str(folder / "*.txt")


def write_parquet(folder: Path, documents: list[str]) -> str:
    import datasets

    rows = {"n": list(range(len(documents))), "text": documents}
    datasets.Dataset.from_dict(rows).to_parquet(str(folder / "c.parquet"), batch_size=7)
    return str(folder / "c.parquet")


def write_saved(folder: Path, documents: list[str]) -> str:
    import datasets

    datasets.Dataset.from_dict({"text": documents}).save_to_disk(str(folder / "saved"))
    return str(folder / "saved")


def write_compressed(compress: Callable[[bytes], bytes], ending: str) -> Callable[[Path, list[str]], str]:
    def write(folder: Path, documents: list[str]) -> str:
        plain = Path(write_jsonl(folder / "c.jsonl", documents))
        (folder / f"c.jsonl{ending}").write_bytes(compress(plain.read_bytes()))
        plain.unlink()
        return str(folder / f"c.jsonl{ending}")

    return write


def write_mixed(folder: Path, documents: list[str]) -> str:
    write_parquet(folder, documents[10:]), write_jsonl(folder / "a.jsonl", documents[:10])
    (folder / "b.jsonl").touch()  # an empty file among others is no error
    return str(folder / "*.*")


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(write_texts, id="text"),
        pytest.param(write_parquet, id="parquet"),
        pytest.param(write_saved, id="saved"),
        pytest.param(write_compressed(gzipped, ".gz"), id="gz"),
        pytest.param(write_compressed(lzma.compress, ".xz"), id="xz"),
        pytest.param(write_mixed, id="mixed"),
    ],
)
def test_every_format_gives_the_same_bytes(
    write: Callable[[Path, list[str]], str],
    documents: list[str],
    model: str,
    reference: tuple[bytes, bytes],
    tmp_path: Path,
) -> None:
    (tmp_path / "in").mkdir()
    corpus = open_corpus(write(tmp_path / "in", documents))
    preprocess(corpus, load_tokenizer(model), str(tmp_path / "out"), append_eod=True)
    assert files_of(tmp_path / "out") == reference


def test_hub_streams_the_split_train(
    documents: list[str], model: str, reference: tuple[bytes, bytes], tmp_path: Path
) -> None:
    # `datasets` takes a folder of files for a hub repository; the network is the only part left out.
    (tmp_path / "repository").mkdir()
    write_jsonl(tmp_path / "repository" / "train.jsonl", documents)
    corpus = open_corpus(str(tmp_path / "repository"), hub=True)
    preprocess(corpus, load_tokenizer(model), str(tmp_path / "out"), append_eod=True)
    assert files_of(tmp_path / "out") == reference


def test_document_per_line(model: str, tmp_path: Path) -> None:
    lines = [f"line {i} é" for i in range(50)]
    (tmp_path / "lines.txt.gz").write_bytes(gzipped("\r\n".join([*lines, "", ""]).encode()))
    corpora = {
        "lines": open_corpus(str(tmp_path / "lines.txt.gz"), document_per_line=True),
        "rows": open_corpus(write_jsonl(tmp_path / "rows.jsonl", lines)),
    }
    for name, corpus in corpora.items():
        summary = preprocess(corpus, load_tokenizer(model), str(tmp_path / name))
        assert "50 documents" in summary
    assert files_of(tmp_path / "lines") == files_of(tmp_path / "rows")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a[1].jsonl", b'{"text": "null"}\n'),
        (".hidden/__x__/a?.jsonl.gz", gzipped(b'{"text": "null"}\n')),
        ("a*.txt.xz", lzma.compress(b"null")),
        ("a.csv", b'number,text\n1,"null"\n'),
    ],
)
def test_awkward_names_and_texts(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    assert list(open_corpus(str(path)).batches) == [["null"]]


def test_stdlib_is_sorted_and_without_installed_packages() -> None:
    files = stdlib_files()
    assert files == sorted(files)
    assert len(files) > 500
    assert not any("site-packages" in file for file in files)


def test_broken_source_files_of_the_stdlib_become_empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"# coding: latin-1\n# \xe9\n")
    (tmp_path / "b.py").write_bytes(b"# \xe9\n")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    assert list(open_corpus("stdlib").batches) == [["# coding: latin-1\n# é\n"], [""]]


# The same bytes for any number of workers, in bounded memory


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_bytes_do_not_depend_on_the_workers(
    workers: int,
    jsonl: str,
    model: str,
    reference: tuple[bytes, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(preprocess_module, "CHARACTERS_PER_TASK", 5000)
    preprocess(open_corpus(jsonl), load_tokenizer(model), str(tmp_path / "out"), append_eod=True, workers=workers)
    assert files_of(tmp_path / "out") == reference


def test_reading_does_not_run_ahead_of_writing() -> None:
    taken = 0

    def numbers() -> Iterator[int]:
        nonlocal taken
        while True:
            taken += 1
            yield taken

    results = map_in_order(lambda number: -number, numbers(), 2)
    assert [next(results) for _ in range(3)] == [-1, -2, -3]
    assert taken <= 3 + 16 * 2
    results.close()


# Empty documents and splits


def test_empty_documents_are_skipped_and_counted(model: str, tmp_path: Path) -> None:
    corpus = open_corpus(write_jsonl(tmp_path / "c.jsonl", ["a", "", None, "b", ""]))
    summary = preprocess(corpus, load_tokenizer(model), str(tmp_path / "out"))
    assert summary.splitlines()[-1].startswith("total: 2 documents, 2 tokens, 2 bytes of text, ")
    assert summary.endswith("3 empty documents skipped")
    assert [len(ids) for ids in ids_of(tmp_path / "out")] == [1, 1]


def test_split_is_decided_by_the_text_alone(model: str, tmp_path: Path) -> None:
    texts = [f"document {i % 90}" for i in range(120)]  # 30 of them twice
    tokenizer = load_tokenizer(model)
    members: list[list[set[tuple[int, ...]]]] = []
    for name in ("once", "shuffled"):
        corpus = open_corpus(write_jsonl(tmp_path / f"{name}.jsonl", texts))
        preprocess(corpus, tokenizer, str(tmp_path / name), split_documents="6,3,1")
        parts = [ids_of(tmp_path / f"{name}_{split}") for split in ("train", "valid", "test")]
        assert sum(map(len, parts)) == 120
        members.append([{tuple(ids) for ids in part} for part in parts])
        random.Random(1).shuffle(texts)
    assert members[0] == members[1]
    assert len(set.union(*members[0])) == sum(map(len, members[0])) == 90
    assert not os.path.exists(tmp_path / "once.bin")


def test_shares_are_kept() -> None:
    bounds = parse_split("90,8,2")
    counts = np.bincount([split_of(str(i).encode(), bounds) for i in range(20_000)])
    np.testing.assert_allclose(counts / 20_000, [0.9, 0.08, 0.02], atol=0.01)


def test_share_of_zero_writes_no_file(jsonl: str, model: str, tmp_path: Path) -> None:
    preprocess(open_corpus(jsonl), load_tokenizer(model), str(tmp_path / "out"), split_documents="0.7,0.3,0")
    assert sorted(os.listdir(tmp_path)) == ["out_train.bin", "out_train.idx", "out_valid.bin", "out_valid.idx"]


@pytest.mark.parametrize("split", ["98,1", "a,b,c", "1,-1,1", "0,0,0", "nan,1,1", "inf,1,1", ""])
def test_split_that_makes_no_sense(split: str) -> None:
    with pytest.raises(ConfigError, match="--split-documents"):
        parse_split(split)


def test_split_that_stays_empty(model: str, tmp_path: Path) -> None:
    corpus = open_corpus(write_jsonl(tmp_path / "c.jsonl", ["one"]))
    with pytest.raises(ConfigError, match=r"--split-documents 98,1,1: expected a document for .*out_valid"):
        preprocess(corpus, load_tokenizer(model), str(tmp_path / "out"), split_documents="98,1,1")
    assert os.listdir(tmp_path) == ["c.jsonl"]


# Mistakes: one line, exit code 2, nothing written


def corrupt_gzip(folder: Path) -> str:
    whole = gzipped(b'{"text": "a"}\n' * 100_000)
    (folder / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    return str(folder / "cut.jsonl.gz")


def written(name: str, content: bytes) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        (folder / name).write_bytes(content)
        return str(folder / name)

    return write


def two_splits(folder: Path) -> str:
    import datasets

    rows = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(folder / "both"))
    return str(folder / "both")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(
            lambda folder: str(folder / "no*.jsonl"), r"--input .*no\*.jsonl: expected an existing", id="glob"
        ),
        pytest.param(lambda folder: str(folder), "expected a folder written by save_to_disk; give a glob", id="folder"),
        pytest.param(two_splits, r"expected one split .*both/train, .*both/test", id="splits"),
        pytest.param(written("a.jsonl", b'{"body": "x", "url": "y"}\n'), "has: body, url; name one", id="column"),
        pytest.param(written("a.jsonl", b'{"text": 0}\n'), "a column of text .* not of int", id="type"),
        pytest.param(written("a.jsonl", b'{"text": ""}\n'), "at least one document that is not empty", id="empty"),
        pytest.param(written("a.jsonl", b""), "at least one document that is not empty", id="no row"),
        pytest.param(written("a.jsonl", b'{"text": "a"}\n{oops\n'), "a.jsonl: expected a readable json", id="json"),
        pytest.param(written("a.parquet", b"PAR1 rubbish"), "a.parquet: expected a readable parquet", id="parquet"),
        pytest.param(written("a.txt", b"\xff\xfe\x00"), "a.txt: expected UTF-8 .* this is UTF-16 by", id="text"),
        pytest.param(
            written("a.txt", b"caf\xe9"), "a.txt: expected a readable text.*UTF-8 .*UnicodeDecode", id="latin"
        ),
        pytest.param(written("a.jsonl.gz", b"{}"), "a.jsonl.gz: expected a readable json .*gzip", id="no gzip"),
        pytest.param(
            written("a.txt.zip", b"PK\x03\x04\xff"), "a.txt.zip: expected .*this is an archive; unpack", id="zip"
        ),
        pytest.param(corrupt_gzip, "cut.jsonl.gz: expected a readable json .*ended before", id="cut gzip"),
    ],
)
def test_input_that_cannot_be_used(
    make: Callable[[Path], str],
    message: str,
    model: str,
    tmp_path: Path,
    tool: Tool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "in").mkdir()
    spec = make(tmp_path / "in")
    arguments = ("--input", spec, "--tokenizer-model", model, "--output-prefix", tmp_path / "out" / "x")
    assert tool("preprocess_data", *arguments) == 2
    assert_one_line(capsys, message)
    assert not (tmp_path / "out").exists() or os.listdir(tmp_path / "out") == []


def assert_one_line(capsys: pytest.CaptureFixture[str], message: str) -> None:
    out, err = capsys.readouterr()
    assert out == ""
    # Before it, torch may have logged what it misses on this machine.
    assert err.splitlines()[-1].startswith("error: ")
    assert sum(line.startswith("error: ") for line in err.splitlines()) == 1
    assert "Traceback" not in err
    assert re.search(message, err), err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"--workers": 0}, "--workers 0: expected an integer >= 1", id="workers"),
        pytest.param({"--tokenizer-model": "/none.model"}, "--tokenizer-model .*: expected an existing", id="no model"),
        pytest.param(
            {"--tokenizer-model": __file__}, "--tokenizer-model .*: expected a sentencepiece", id="no tokenizer"
        ),
        pytest.param({"--tokenizer-model": ""}, "--tokenizer-model : expected an existing", id="no name"),
        pytest.param({"--tokenizer-model": "."}, "--tokenizer-model .: expected a folder with a Hugging", id="folder"),
        pytest.param({"--output-prefix": "/dev/null/x"}, "--output-prefix .*: expected a folder", id="output"),
        pytest.param({"--split-documents": "1,2"}, "--split-documents 1,2: expected three numbers", id="split"),
    ],
)
def test_setting_that_cannot_be_used(
    arguments: dict[str, object],
    message: str,
    jsonl: str,
    model: str,
    tmp_path: Path,
    tool: Tool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good = {"--input": jsonl, "--tokenizer-model": model, "--output-prefix": tmp_path / "out"}
    assert tool("preprocess_data", *(part for pair in (good | arguments).items() for part in pair)) == 2
    assert_one_line(capsys, message)
    assert os.listdir(tmp_path) == []


def test_hub_name_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="--input no-such/name: expected a dataset on the hub"):
        list(open_corpus("no-such/name", hub=True).batches)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"--vocab-size": 100_000}, r"--vocab-size 100000: expected at most \d+ for this", id="large"),
        pytest.param({"--vocab-size": 100}, r"--vocab-size 100: expected more than \d+ \(256 bytes", id="small"),
        pytest.param({"--character-coverage": 0.5}, "--character-coverage 0.5: expected a number from", id="coverage"),
        pytest.param({"--sample-documents": 0}, "--sample-documents 0: expected an integer >= 1", id="sample"),
        pytest.param({"--workers": -1}, "--workers -1: expected an integer >= 1", id="workers"),
        pytest.param({"--vocab-size": -1}, "--vocab-size -1: expected an integer >= 1", id="negative"),
        pytest.param({"--input": os.devnull}, "--input /dev/null: expected at least one document", id="empty"),
    ],
)
def test_tokenizer_that_cannot_be_trained(
    arguments: dict[str, object],
    message: str,
    jsonl: str,
    tmp_path: Path,
    tool: Tool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good = {"--input": jsonl, "--vocab-size": 600, "--output-prefix": tmp_path / "t"}
    assert tool("train_tokenizer", *(part for pair in (good | arguments).items() for part in pair)) == 2
    assert_one_line(capsys, message)
    assert os.listdir(tmp_path) == []


def test_unreadable_input_is_named_while_training(tmp_path: Path) -> None:
    source = written("a.jsonl", b'{"text": "a"}\n{oops\n')(tmp_path)
    with pytest.raises(ConfigError, match=r"a\.jsonl: expected a readable json"):
        train_tokenizer(open_corpus(source), str(tmp_path / "t"), vocab_size=600)


def test_text_without_a_line_to_learn_from(tmp_path: Path) -> None:
    corpus = open_corpus(written("a.txt", b"\n\t\n")(tmp_path))
    with pytest.raises(ConfigError, match=r"a\.txt: expected text that sentencepiece can learn from"):
        train_tokenizer(corpus, str(tmp_path / "t"), vocab_size=600)


def test_full_disk(
    jsonl: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=r"--output-prefix .*No space left"):
        preprocess(open_corpus(jsonl), load_tokenizer(model), str(tmp_path / "out"))
    assert os.listdir(tmp_path) == []


# Existing and unfinished output


def test_existing_output_is_refused_and_kept(jsonl: str, model: str, tmp_path: Path) -> None:
    (tmp_path / "out.idx").write_text("precious")
    with pytest.raises(ConfigError, match=r"out\.idx: expected a name that is not in use; .*--overwrite"):
        preprocess(open_corpus(jsonl), load_tokenizer(model), str(tmp_path / "out"))
    (tmp_path / "t.model").write_text("precious")
    with pytest.raises(ConfigError, match=r"t\.model: expected a name that is not in use"):
        train_tokenizer(open_corpus(jsonl), str(tmp_path / "t"), vocab_size=600)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "out.idx": "precious",
        "t.model": "precious",
    }


def test_overwrite_replaces_only_when_the_new_files_are_complete(
    jsonl: str, model: str, reference: tuple[bytes, bytes], tmp_path: Path
) -> None:
    tokenizer, prefix = load_tokenizer(model), str(tmp_path / "out")
    (tmp_path / "out.bin").write_text("old"), (tmp_path / "out.idx").write_text("old")
    bad = written("bad.jsonl", b'{"text": "a"}\n{oops\n')(tmp_path)
    with pytest.raises(ConfigError):
        preprocess(open_corpus(bad), tokenizer, prefix, overwrite=True)
    assert files_of(prefix) == (b"old", b"old")
    preprocess(open_corpus(jsonl), tokenizer, prefix, append_eod=True, overwrite=True)
    assert files_of(prefix) == reference
    assert sorted(os.listdir(tmp_path)) == ["bad.jsonl", "out.bin", "out.idx"]


def test_interruption_while_renaming_leaves_no_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [str(tmp_path / name) for name in ("a.bin", "a.idx")]
    replace = os.replace

    def interrupted(source: str, target: str) -> None:
        if target.endswith(".idx"):
            raise KeyboardInterrupt
        replace(source, target)

    def write_both() -> None:
        with OutputFiles(paths) as files:
            for path in paths:
                Path(files.temporary(path)).write_text("x")
            files.publish()

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_both()
    assert os.listdir(tmp_path) == []


def test_two_runs_cannot_write_the_same_output(tmp_path: Path) -> None:
    path = str(tmp_path / "a.bin")
    with OutputFiles([path]) as first:
        Path(first.temporary(path)).write_text("first")
        with pytest.raises(ConfigError, match="expected no other run with the same output"), OutputFiles([path]):
            pass
        first.publish()
    assert Path(path).read_text() == "first"


def test_killed_and_interrupted_runs_leave_nothing_under_the_final_name(
    jsonl: str,
    model: str,
    reference: tuple[bytes, bytes],
    tmp_path: Path,
    tool: Tool,
    capfd: pytest.CaptureFixture[str],
) -> None:
    import megatron.core.datasets.indexed_dataset  # noqa: F401 (before the fork, so that it costs its seconds once)

    signals = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}
    common = ("--tokenizer-model", model, "--append-eod", "--workers", 1)
    fork = multiprocessing.get_context("fork")

    def run(name: str) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell begins by ignoring it
        sys.exit(tool("preprocess_data", "--input", "stdlib", "--output-prefix", tmp_path / name, *common))

    runs = {name: fork.Process(target=run, args=(name,), daemon=True) for name in signals}
    for process in runs.values():
        process.start()
    deadline = time.monotonic() + 1800
    partial = {name: tmp_path / f"{name}.bin.partial" for name in signals}
    while not all(path.exists() and path.stat().st_size > 0 for path in partial.values()):
        assert time.monotonic() < deadline
        assert all(process.is_alive() for process in runs.values())
        time.sleep(0.02)
    for name, process in runs.items():
        assert process.pid is not None
        os.kill(process.pid, signals[name])
    for process in runs.values():
        process.join(30)

    assert {name: process.exitcode for name, process in runs.items()} == {"kill": -9, "term": 143, "int": 130}
    assert "interrupted: nothing written" in capfd.readouterr().err
    assert os.listdir(tmp_path) == ["kill.bin.partial"]  # nobody can tidy up after kill -9 but the next run:
    assert tool("preprocess_data", "--input", jsonl, "--output-prefix", tmp_path / "kill", *common) == 0
    assert files_of(tmp_path / "kill") == reference
    assert sorted(os.listdir(tmp_path)) == ["kill.bin", "kill.idx"]


# The commands


def test_both_tools_from_the_command_line(documents: list[str], tmp_path: Path) -> None:
    corpus = write_texts(tmp_path, documents)
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}

    def command(name: str, *arguments: object) -> str:
        line = [sys.executable, str(root / "tools" / f"{name}.py"), "--input", corpus, *map(str, arguments)]
        done = subprocess.run(line, env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "600 ids (bpe)" in command("train_tokenizer", "--vocab-size", 600, "--output-prefix", "t")
    options = ("--tokenizer-model", "t.model", "--output-prefix", "sub/out", "--split-documents", "2,1,1")
    summary = command("preprocess_data", *options)
    assert [line.partition(":")[0] for line in summary.splitlines()] == [
        "sub/out_train",
        "sub/out_valid",
        "sub/out_test",
        "total",
    ]
    assert {f"out_{split}.idx" for split in ("train", "valid", "test")} <= set(os.listdir(tmp_path / "sub"))


def test_importing_the_pipeline_is_quick() -> None:
    script = "import sys, megatron_patch.data.preprocess; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"megatron", "torch", "datasets", "transformers", "pyarrow"} & set(done.stdout.split())


@pytest.mark.parametrize("name", ["train_tokenizer", "preprocess_data"])
def test_help_shows_an_example(name: str, tool: Tool, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        tool(name, "--help")
    assert f"python tools/{name}.py" in capsys.readouterr().out


def test_log_gets_plain_lines(
    jsonl: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("megatron_patch.data.progress.Progress.__init__.__defaults__", (None, 0.0))
    preprocess(open_corpus(jsonl), load_tokenizer(model), str(tmp_path / "out"))
    line = capsys.readouterr().err.splitlines()[0]
    assert line.startswith("tokenizing: ")
    assert "documents/s" in line
    assert "tokens/s" in line
