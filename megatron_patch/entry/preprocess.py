"""Turn text into a Megatron dataset (.bin and .idx); see docs/data.md."""

import argparse
import signal
import sys
from collections.abc import Sequence

from megatron_patch.data.readers import READABLE
from megatron_patch.entry.exits import exit_code
from megatron_patch.entry.parsers import command_parser

EXAMPLE = """example:
  {started} --input 'corpus/*.jsonl.gz' --tokenizer-model data/code.model --append-eod \\
      --output-prefix data/code --split-documents 98,1,1
writes data/code_train.bin, .idx and so on, for Megatron's --train-data-path data/code_train --valid-data-path ..."""
SPEC = """stdlib (the Python standard library's own .py files); or a file or quoted glob: text, jsonl, json, parquet,
csv, arrow, also .gz .xz .bz2 .zst; or a folder written by save_to_disk; or a name on the hub with --hub"""
SPLIT = """train,valid,test: write P_train, P_valid, P_test instead of P, with about these shares of the documents (0:
not written). A hash of its text decides where a document goes, so duplicates stay together and no run differs"""


def parser(started: str) -> argparse.ArgumentParser:
    """Return the parser of the command line; for `started` see `command_parser`."""
    result = command_parser(started, __doc__, EXAMPLE)
    add = result.add_argument
    add("--input", required=True, metavar="SPEC", help=SPEC)
    add("--tokenizer-model", required=True, metavar="M", help="sentencepiece model, or folder of a hub tokenizer")
    add("--output-prefix", required=True, metavar="P", help="the dataset is written to P.bin and P.idx")
    add("--text-key", default="text", help="column that holds the text; default: %(default)s")
    add("--format", choices=READABLE, help="what the files are; default: what their names say")
    add("--document-per-line", action="store_true", help="every line of a plain text file is a document")
    add("--append-eod", action="store_true", help="end every document with the tokenizer's end-of-document id")
    add("--split-documents", metavar="A,B,C", help=SPLIT)
    add("--hub", action="store_true", help="SPEC is a dataset on the Hugging Face hub, NAME or NAME:CONFIG")
    add("--workers", type=int, metavar="N", help="threads, without effect on the result; default: one per core")
    add("--overwrite", action="store_true", help="replace existing output")
    return result


def main(argv: Sequence[str] | None = None, started: str = "python tools/preprocess_data.py") -> int:
    """Do what the command line asks for and return the exit code."""
    args = vars(parser(started).parse_args(argv))
    source = {key: args.pop(key) for key in ("text_key", "document_per_line", "hub", "format")}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that temporary files are removed

    def act() -> None:
        from megatron_patch.data.corpus import open_corpus
        from megatron_patch.data.preprocess import preprocess
        from megatron_patch.data.tokenizer import load_tokenizer

        corpus = open_corpus(args.pop("input"), **source)
        print(preprocess(corpus, load_tokenizer(args.pop("tokenizer_model")), args.pop("output_prefix"), **args))

    return exit_code(act, interrupted="nothing written")
