"""Say of every host of a hostfile what would keep a run from starting; end what an earlier run left there."""

import argparse
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_patch.entry.exits import exit_code
from megatron_patch.entry.parsers import command_parser
from megatron_patch.errors import ConfigError, ExitCode

if TYPE_CHECKING:
    from megatron_patch.entry.asked import Asked
    from megatron_patch.hosts.check import Wanted
    from megatron_patch.hosts.remote import Hosts

EXAMPLE = """examples:
  {started} --hostfile hosts --config configs/target_7b_h100_bf16.yaml --save /runs/7b
  {started} --hostfile hosts --end 20261129-115426-96fa6666
Asked over ssh, of all hosts at once: does it answer without a password, is the working directory there, are Python,
packages, config and data (size, and a hash of samples of each .idx and .bin) those of the first host, are there as many
GPUs as slots, free, and of one kind (nvidia-smi), is the master port free, can --save be written to and how much room
is there, is it one place for all, are processes of another job running, is the clock right. Exit code 1 if a run would
fail or be wrong. launch/pretrain_multinode.sh asks the same before it starts."""


def parser(started: str) -> argparse.ArgumentParser:
    """Return the parser of the command line; for `started` see `command_parser`."""
    result = command_parser(started, __doc__, EXAMPLE)
    result.add_argument("--hostfile", required=True, metavar="FILE", help='one line "HOST slots=GPUS" per machine')
    result.add_argument("--ssh-port", metavar="P", help="of sshd on every host; default: what ssh itself thinks")
    result.add_argument(
        "--config", metavar="FILE", help="flags as YAML: must be the same everywhere, and names data, save, cpu"
    )
    result.add_argument(
        "--data-path",
        nargs="+",
        metavar="PREFIX",
        help="datasets that must be the same everywhere, in place of its own",
    )
    result.add_argument("--save", metavar="DIR", help="the folder that the run will save to")
    result.add_argument("--master-port", type=int, default=29500, metavar="P", help="default: 29500")
    result.add_argument("--end", metavar="JOB", help="end all processes of this job on all hosts, and do no more")
    return result


def main(argv: Sequence[str] | None = None, started: str = "megatron-patch doctor") -> int:
    """Do what the command line asks for and return the exit code."""
    args = parser(started).parse_args(argv)

    def act() -> int:
        from megatron_patch.hosts.check import read_hostfile
        from megatron_patch.hosts.remote import Hosts

        slots = read_hostfile(args.hostfile)
        wanted = None if args.end else asked(args).wanted(args.master_port, slots)
        hosts = Hosts(list(slots), args.ssh_port)
        try:
            return _examine(hosts, wanted) if wanted else _end(hosts, args.end)
        finally:
            hosts.close()

    return exit_code(act, interrupted="nothing was changed" if not args.end else "perhaps not everywhere")


def _end(hosts: "Hosts", job: str) -> int:
    code = ExitCode.DONE
    for host, answer in hosts.ask("end", within=60, job=job, patience=10).items():
        if isinstance(answer, dict) and not answer["left"]:
            print(f"{host}: {answer['ended']} processes ended")
        else:
            code = ExitCode.FAILED
            left = f"cannot be ended: {answer['left']}" if isinstance(answer, dict) else str(answer)
            print(f"{host}: {left}")
    return code


def asked(args: argparse.Namespace) -> "Asked":
    """Return what the command line and the config say of the run.

    Raises:
        ConfigError: the config cannot be read.
    """
    from megatron_patch.entry.asked import Asked
    from megatron_patch.files.yaml_flags import load_yaml

    words = ["--save", args.save] if args.save else []
    words += ["--data-path", *args.data_path] if args.data_path else []
    return Asked.of_flags(args.config, load_yaml(args.config) if args.config else {}, words)


def _examine(hosts: "Hosts", wanted: "Wanted") -> int:
    from megatron_patch.hosts.check import HELLO, examine, see

    began = time.monotonic()
    hosts.ask("ping", within=HELLO)
    troubles, save = examine(hosts, wanted), wanted.save
    fatal = any(trouble.fatal for trouble in troubles)
    for host in hosts.remotes:
        of_host = [str(trouble) for trouble in troubles if trouble.host == host]
        print(*(of_host or [f"{host}: nothing found"]), sep="\n")
    if save and os.path.isdir(save) and not fatal:
        try:
            see(hosts, save)
            print(f"--save {save} is one place for all hosts")
        except ConfigError as error:
            print(error)
            fatal = True
    print(f"{len(hosts.remotes)} hosts in {time.monotonic() - began:.1f} s")
    return ExitCode.FAILED if fatal else ExitCode.DONE
