"""Train a sentencepiece tokenizer for Megatron on any text; see docs/data.md."""

import argparse
import signal
from collections.abc import Sequence

from megatron_patch.data.readers import READABLE
from megatron_patch.entry.exits import exit_code
from megatron_patch.entry.parsers import command_parser

EXAMPLE = """example:
  {started} --input stdlib --vocab-size 4096 --sample-documents 400 --output-prefix data/code
writes data/code.model, for Megatron's --tokenizer-type SentencePieceTokenizer --tokenizer-model data/code.model"""


def parser(started: str) -> argparse.ArgumentParser:
    """Return the parser of the command line; for `started` see `command_parser`."""
    result = command_parser(started, __doc__, EXAMPLE)
    add = result.add_argument
    add("--input", required=True, metavar="SPEC", help="as for `megatron-patch preprocess`")
    add("--vocab-size", required=True, type=int, metavar="N", help="number of ids, with 256 bytes and 4 special ids")
    add("--output-prefix", required=True, metavar="P", help="the model is written to P.model")
    add("--model-type", choices=("bpe", "unigram"), default="bpe", help="default: %(default)s")
    add(
        "--character-coverage",
        type=float,
        default=0.9995,
        metavar="F",
        help="share of the characters with ids of their own, the rest are spelt in bytes; default: %(default)s",
    )
    add("--sample-documents", type=int, metavar="N", help="train on a random sample, the same every time; default: all")
    add("--text-key", default="text", help="column that holds the text; default: %(default)s")
    add("--format", choices=READABLE, help="what the files are; default: what their names say")
    add("--document-per-line", action="store_true", help="every line of a plain text file is a document")
    add("--hub", action="store_true", help="SPEC is a dataset on the Hugging Face hub, NAME or NAME:CONFIG")
    add("--workers", type=int, metavar="N", help="cores to use, without effect on the model; default: all")
    add("--overwrite", action="store_true", help="replace an existing model")
    return result


def main(argv: Sequence[str] | None = None, started: str = "python tools/train_tokenizer.py") -> int:
    """Do what the command line asks for and return the exit code."""
    args = vars(parser(started).parse_args(argv))
    source = {key: args.pop(key) for key in ("text_key", "document_per_line", "hub", "format")}
    # sentencepiece would see Ctrl-C only after hours of training; ending at once loses nothing, the model comes last.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def act() -> None:
        from megatron_patch.data.corpus import open_corpus
        from megatron_patch.data.tokenizer import train_tokenizer

        print(train_tokenizer(open_corpus(args.pop("input"), **source), args.pop("output_prefix"), **args))

    return exit_code(act)
