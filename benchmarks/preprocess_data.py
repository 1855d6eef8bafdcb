"""Tokens per second of our preprocessing and of Megatron-LM's own, on the same text, tokenizer and workers.

    MEGATRON_LM_DIR=path/to/Megatron-LM python benchmarks/preprocess_data.py [--megabytes 8] [--workers 1 2]

Both run by turns in this process with everything imported beforehand, from opening a .jsonl file to the finished index.
Time is given twice: by the clock, and as CPU time over all threads and child processes, which other programs on the
machine disturb less. The outputs must be equal byte for byte, or the benchmark fails.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import os
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_patch.data.corpus import open_corpus
from megatron_patch.data.preprocess import preprocess
from megatron_patch.data.tokenizer import load_tokenizer, train_tokenizer


def write_jsonl(path: Path, megabytes: float) -> None:
    """Write every n-th document of the standard library, so that the file has about this size in MB."""
    documents = [text for batch in open_corpus("stdlib").batches for text in batch if text]
    step = max(1, round(sum(map(len, documents)) / (megabytes * 1e6)))
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in documents[::step])


def load_their_tool(checkout: str) -> Any:
    """Import tools/preprocess_data.py of a Megatron-LM checkout as a module."""
    spec = importlib.util.spec_from_file_location("their_tool", os.path.join(checkout, "tools", "preprocess_data.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["their_tool"] = module  # its workers get a pickled method, which names the module
    spec.loader.exec_module(module)
    return module


def timed(work: Callable[[int], object], workers: int) -> tuple[float, float]:
    """Call `work(workers)` and return (clock seconds, CPU seconds of this process and its children)."""

    def cpu() -> float:
        usages = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    clock_start, cpu_start = time.monotonic(), cpu()
    work(workers)
    return time.monotonic() - clock_start, cpu() - cpu_start


def main() -> None:
    """Run both by turns and print the rates and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=8.0, help="size of the text; default: %(default)s")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3, help="the medians are compared; default: %(default)s")
    parser.add_argument(
        "--tokenizer-model", help="sentencepiece model or tokenizer folder; default: train one, 4096 ids"
    )
    args = parser.parse_args()
    if "MEGATRON_LM_DIR" not in os.environ:
        sys.exit("MEGATRON_LM_DIR must name a Megatron-LM checkout")
    warnings.simplefilter("ignore")
    their_tool = load_their_tool(os.environ["MEGATRON_LM_DIR"])

    with tempfile.TemporaryDirectory() as name:
        text = Path(name, "text.jsonl")
        write_jsonl(text, args.megabytes)
        model = args.tokenizer_model
        if model is None:
            print(train_tokenizer(open_corpus("stdlib"), f"{name}/code", vocab_size=4096, sample_documents=200))
            model = f"{name}/code.model"
        kind = "HuggingFaceTokenizer" if os.path.isdir(model) else "SentencePieceTokenizer"

        def ours(workers: int) -> None:
            corpus, tokenizer = open_corpus(str(text)), load_tokenizer(model)
            preprocess(corpus, tokenizer, f"{name}/ours", append_eod=True, workers=workers, overwrite=True)

        def theirs(workers: int) -> None:
            arguments = {"input": text, "output-prefix": f"{name}/theirs", "workers": workers, "log-interval": 1 << 30}
            arguments |= {"tokenizer-type": kind, "tokenizer-model": model}
            sys.argv = ["preprocess_data.py", "--append-eod", *(f"--{key}={value}" for key, value in arguments.items())]
            their_args = their_tool.get_args()
            with contextlib.redirect_stdout(io.StringIO()):
                their_tool.Partition(their_args, workers).process_json_file((str(text), f"{name}/theirs"))

        for warm_up in (ours, theirs):  # imports what is imported on first use
            warm_up(1)
        tokens = os.path.getsize(f"{name}/ours.bin") / 2
        print(f"{os.path.getsize(text)} bytes, {tokens:.0f} tokens, {kind}")
        for workers in args.workers:
            seconds: dict[str, list[tuple[float, float]]] = {"ours": [], "theirs": []}
            for _ in range(args.repeats):
                seconds["ours"].append(timed(ours, workers))
                seconds["theirs"].append(timed(theirs, workers))
            for ending in ("bin", "idx"):
                if (
                    Path(name, f"ours.{ending}").read_bytes()
                    != Path(name, f"theirs_text_document.{ending}").read_bytes()
                ):
                    sys.exit(f"the two tools wrote different .{ending} files")
            for index, unit in enumerate(("tokens per second", "tokens per CPU second")):
                rates = {tool: tokens / statistics.median(run[index] for run in runs) for tool, runs in seconds.items()}
                print(
                    f"workers {workers}, {unit}: ours {rates['ours']:,.0f}, theirs {rates['theirs']:,.0f}, "
                    f"ratio {rates['ours'] / rates['theirs']:.2f}"
                )
        print("outputs equal byte for byte")


if __name__ == "__main__":
    main()
