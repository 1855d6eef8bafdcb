"""Turn the sweep of a proxy into the tuned config of a wide model; see docs/transfer-config.md."""

import argparse
from collections.abc import Sequence

from megatron_patch.config import WARMUPS, WIDTH_RULES
from megatron_patch.entry.exits import exit_code
from megatron_patch.entry.parsers import command_parser
from megatron_patch.theory.transfer import BATCH_RULES

EXAMPLE = """example:
  {started} --sweep runs/sweep --target configs/target_7b_h100_bf16.yaml --output tuned.yaml
exit code: 0 written, 2 a mistake in the arguments or files, 3 refused: the sweep does not tell the optimum, or proxy
and target differ in what no rule covers; the reason is on stderr and nothing is written"""


def parser(started: str) -> argparse.ArgumentParser:
    """Return the parser of the command line; for `started` see `command_parser`."""
    result = command_parser(started, __doc__, EXAMPLE)
    add = result.add_argument
    add("--sweep", required=True, metavar="PATH", help="folder of runs (run.json, TensorBoard, W&B offline), or a CSV")
    add("--target", required=True, metavar="TARGET.yaml", help="config of the wide model; it is not changed")
    add("--output", required=True, metavar="OUT.yaml", help="tuned copy of the target's config; replaced")
    add("--proxy", metavar="PROXY.yaml", help="the proxy's config, for sweeps that do not record it (CSV)")
    add("--json", action="store_true", help="print one JSON object instead of tables")
    add(
        "--force", action="store_true", help="go on where it would refuse; every reason becomes a warning and a comment"
    )
    choice = result.add_argument_group("what to transfer")
    add = choice.add_argument
    add("--rule", choices=WIDTH_RULES, help="width rule; default: the target's, else the sweep's")
    add("--base-hidden-size", type=int, metavar="N", help="width of the proxy; default: the sweep's smallest")
    add("--weight-decay", type=float, metavar="W", help="use the runs with this weight decay; for a CSV without: its")
    add("--vector-lr", type=float, metavar="V", help="use the runs with this vector LR, if there are several")
    add("--steps", type=int, metavar="N", help="use the runs of this length, if there are several")
    add("--extra-warmup", choices=WARMUPS, help="write this extra warmup; default: the target's")
    add("--extra-warmup-fraction", type=float, metavar="F", help="length of the extra warmup exp")
    beyond = result.add_argument_group("what width rules do not cover, all off by default")
    add = beyond.add_argument
    add("--ema-timescale", action="store_true", help="scale weight decay to keep B / (lr * wd * D), arXiv 2405.13698")
    add("--batch-lr", choices=BATCH_RULES, help="scale the LR with the batch: sqrt (2205.10287) or linear (1706.02677)")
    add("--depth-lr", action="store_true", help="scale the LR by 1/sqrt(depth), arXiv 2505.01618 with alpha = 1/2")
    return result


def main(argv: Sequence[str] | None = None, started: str = "python tools/transfer_config.py") -> int:
    """Do what the command line asks for and return the exit code."""
    args = vars(parser(started).parse_args(argv))
    files = (args.pop("sweep"), args.pop("target"), args.pop("output"))
    proxy, as_json = args.pop("proxy"), args.pop("json")

    def act() -> None:
        from megatron_patch.transfer.convert import convert
        from megatron_patch.transfer.options import Options

        convert(*files, Options(**args), proxy=proxy, as_json=as_json)

    return exit_code(act, interrupted="nothing written")
