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
    from megatron_patch.hosts.remote import Hosts

EXAMPLE = """examples:
  {started} --hostfile hosts --config configs/target_7b_h100_bf16.yaml --save /runs/7b
  {started} --hostfile hosts --end 20261129-115426-96fa6666
Asked over ssh, of all hosts at once: does it answer without a password, is the working directory there, are Python,
packages and config those of the first host, is the master port free, can --save be written to and how much room is
there, is it one place for all, are processes of another job running, is the clock right. Exit code 1 if a run would
fail or be wrong. launch/pretrain_multinode.sh asks the same before it starts."""


def parser(started: str) -> argparse.ArgumentParser:
    """Return the parser of the command line; for `started` see `command_parser`."""
    result = command_parser(started, __doc__, EXAMPLE)
    result.add_argument("--hostfile", required=True, metavar="FILE", help='one line "HOST slots=GPUS" per machine')
    result.add_argument("--ssh-port", metavar="P", help="of sshd on every host; default: what ssh itself thinks")
    result.add_argument("--config", metavar="FILE", help="a file that must be the same everywhere")
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

        hosts = Hosts(read_hostfile(args.hostfile), args.ssh_port)
        try:
            return _end(hosts, args.end) if args.end else _examine(hosts, args)
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


def _examine(hosts: "Hosts", args: argparse.Namespace) -> int:
    from megatron_patch.hosts.check import HELLO, Wanted, examine, see

    began = time.monotonic()
    hosts.ask("ping", within=HELLO)
    files = (args.config,) if args.config else ()
    save = args.save and os.path.abspath(args.save)
    troubles = examine(hosts, Wanted(os.getcwd(), files, save, args.master_port))
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
