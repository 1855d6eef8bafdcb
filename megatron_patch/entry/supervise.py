"""Run a launcher's command line: check the hosts, watch, end everything, judge how it ended.

What the scripts in launch/ hand their command line to; docs/launch.md says what a user sees of it.
"""

import argparse
import contextlib
import datetime
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeGuard

from megatron_patch.entry.asked import Asked
from megatron_patch.entry.exits import exit_code
from megatron_patch.errors import ConfigError, ExitCode
from megatron_patch.files.run_json import JOB, Status
from megatron_patch.hosts.check import Wanted, examine, greet, read_hostfile, see, take_save
from megatron_patch.hosts.follower import Follower
from megatron_patch.hosts.hang import SLOW, Allowed
from megatron_patch.hosts.job import Job, Launch
from megatron_patch.hosts.links import ssh_arguments
from megatron_patch.hosts.remote import Hosts
from megatron_patch.hosts.restarts import TRACKER, Ended, check_restarts, supervised
from megatron_patch.hosts.several import Lobby, join


def main(argv: Sequence[str]) -> int:
    """Do what the command line asks for and return the exit code: the run's, or 2 where it was not started."""
    parser = argparse.ArgumentParser(prog="supervise", description=__doc__, allow_abbrev=False)
    parser.add_argument("--hostfile", help="without it the command starts processes on this machine alone")
    parser.add_argument("--name", required=True, help="of the script, before what is said")
    parser.add_argument("--ssh-port")
    parser.add_argument("--master-port", type=int, default=29500)
    parser.add_argument("--log-dir")
    parser.add_argument("--env-file", help="DeepSpeed's file of variables for all hosts; removed at the end")
    parser.add_argument("--no-doctor", action="store_true", help="do not compare the hosts beforehand")
    parser.add_argument("--restarts", type=int, default=0, help="after a crash, from the last checkpoint")
    parser.add_argument("--hang-timeout", type=float, help="seconds that a step may take; 0: no limit")
    parser.add_argument("--hang-timeout-slow", type=float, help="seconds for the start, a checkpoint, the end")
    parser.add_argument("--node-rank", type=int, help="the others are started by the same command, not over ssh")
    parser.add_argument("--master-addr", help="of the first host; with --node-rank")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="after --")
    args = parser.parse_args(argv)
    try:
        return exit_code(lambda: _restarted(args), interrupted="nothing was started")
    finally:
        if args.env_file:
            with contextlib.suppress(OSError):
                os.remove(args.env_file)


def _restarted(args: argparse.Namespace) -> int:
    asked = Asked.of(_run_of(args))
    allowed(args, asked)

    def say(text: str) -> None:
        print(f"{args.name}: {text}", file=sys.stderr, flush=True)

    if args.restarts:
        check_restarts(args.restarts, asked.save, asked.load)
    if args.node_rank is None:
        return supervised(lambda: supervise(args), args.restarts, say, time.sleep)
    if not lockable(asked.save):
        if args.restarts:
            raise ConfigError("--restarts", args.restarts, "--save on a file system, without ssh", "give a folder")
        say("without a --save folder nothing joins the hosts: each one watches its own ranks alone")
        return supervise(args).code
    if args.node_rank:
        return follow(args, os.path.abspath(asked.save), say)
    return lead(args, say)


def lockable(save: str | None) -> TypeGuard[str]:
    """Return whether --save is a folder that a lock can be in, and no object store."""
    return bool(save) and "://" not in str(save)


def lead(args: argparse.Namespace, say: Callable[[str], None]) -> int:
    """Be the first of several hosts on which the same command is started: all attempts begin and end together."""
    lobby = Lobby(list(read_hostfile(args.hostfile)))
    text = "the launch on the first host has ended"

    def attempt() -> Ended:
        nonlocal text
        ended, text = watched(args, lobby)
        return ended

    def said(line: str) -> None:
        say(line)
        lobby.tell(do="say", text=line)

    code = 1
    try:
        code = supervised(attempt, args.restarts, said, time.sleep)
        return code
    except ConfigError as error:
        code, text = ExitCode.MISTAKE, str(error)
        raise
    except KeyboardInterrupt:
        code, text = ExitCode.INTERRUPTED, "ended by SIGINT on the first host"
        raise
    finally:
        lobby.dismiss(code, text)


def follow(args: argparse.Namespace, save: str, say: Callable[[str], None]) -> int:
    """Be another one of them."""
    line = join(save, args.master_addr, args.node_rank, say)
    return Follower(line, _command(args), os.environ, say).run()


def _command(args: argparse.Namespace) -> list[str]:
    return list(args.command[1:] if args.command[:1] == ["--"] else args.command)


def _run_of(args: argparse.Namespace) -> list[str]:
    """What follows ``megatron_patch run``."""
    command = _command(args)
    return command[command.index("megatron_patch") + 2 :]


def supervise(args: argparse.Namespace) -> Ended:
    """Start the command and see it to its end; see `watched`."""
    return watched(args)[0]


def watched(args: argparse.Namespace, lobby: Lobby | None = None) -> tuple[Ended, str]:
    """Start the command and see it to its end.

    Args:
        args: of the command line.
        lobby: where the hosts come from that start their own part; None: they are started over ssh, or are not known.

    Returns:
        How it ended, and that in words.

    Raises:
        ConfigError: a host cannot be reached or differs, --save is taken or not one place: nothing was started.
    """
    asked = Asked.of(_run_of(args))
    slots = read_hostfile(args.hostfile) if args.hostfile else {}
    alone = not args.hostfile or (args.node_rank is not None and lobby is None)
    names = (socket.gethostname(),) if alone else tuple(slots)
    # Of several that do not know of each other, none can say whose --save it is.
    ours = not alone or not args.hostfile
    now = datetime.datetime.now(datetime.UTC)
    job = Job(
        id=f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(4)}",
        hosts=names,
        save=os.path.abspath(asked.save) if ours and lockable(asked.save) else None,
        metrics=asked.metrics and os.path.abspath(asked.metrics) if ours else None,
        log_dir=args.log_dir and os.path.abspath(args.log_dir),
        allowed=allowed(args, asked),
    )
    local = alone or lobby is not None
    hosts = Hosts(names[:1] if local else names, args.ssh_port, job.id, local)
    try:
        greet(hosts)
        record = {"job": job.id, "host": socket.gethostname(), "pid": os.getpid(), "started": f"{now:%F %T} UTC"}
        dead = None
        if lobby and job.save:  # the others look for the lock to find us
            dead = take_save(hosts, job.save, record | lobby.address)
            gather(hosts, lobby, job, args.name)
        launch = Launch(job, hosts, args.name, names[1:] if lobby else ())
        if not alone and not args.no_doctor:
            doctor(hosts, asked.wanted(args.master_port, slots), args.name)
        if job.save and not lobby:
            dead = take_save(hosts, job.save, record)
        if dead is not None:
            clean_up(hosts, launch, dead)
        print(f"> job {job.id} on {' '.join(names)}\n> {job.allowed}", flush=True)
        code = launch.run(_command(args), environment(job, args.env_file))
        found = launch.record() if args.restarts else None
        tracker = checkpointed(hosts, job.save) if args.restarts and job.save else None
        return Ended(code, found is not None and found[1].stands(Status.DIVERGED), tracker), launch.last
    finally:
        hosts.close()


def gather(hosts: Hosts, lobby: Lobby, job: Job, name: str) -> None:
    """Wait for the other hosts and take them in.

    Raises:
        ConfigError: they do not come, do not answer, or do not see what is written to --save.
    """
    assert job.save is not None
    for host, peer in lobby.gather(lambda text: print(f"{name}: {text}", file=sys.stderr, flush=True)).items():
        peer.begin(job.id)
        hosts.add(host, peer)
    greet(hosts)
    see(hosts, job.save)


def allowed(args: argparse.Namespace, asked: Asked) -> Allowed:
    """Return how long nothing may go on: ranks that may wait for each other for long are given that time."""
    slow = args.hang_timeout_slow
    found = Allowed(args.hang_timeout, max(SLOW, asked.wait or 0) if slow is None else slow)
    found.check()
    return found


def checkpointed(hosts: Hosts, save: str) -> str | None:
    """Return what Megatron's tracker file says, where a host sees one."""
    said = hosts.ask("read", path=os.path.join(save, TRACKER)).values()
    return next((text.strip() for text in said if isinstance(text, str)), None)


def doctor(hosts: Hosts, wanted: Wanted, name: str) -> None:
    """Compare the hosts.

    Raises:
        ConfigError: with the first thing that the run would fail at; the others are printed.
    """
    troubles = examine(hosts, wanted)
    fatal = [trouble for trouble in troubles if trouble.fatal]
    for trouble in [*(t for t in troubles if not t.fatal), *fatal[1:]]:
        print(f"{name}: {trouble}", file=sys.stderr, flush=True)
    if fatal:
        fix = "mend it, or start with --no-doctor"
        raise ConfigError("--hostfile", fatal[0].host, f"a host that is like the others ({fatal[0].text})", fix)


def clean_up(hosts: Hosts, launch: Launch, dead: Mapping[str, object]) -> None:
    """End what a dead job has left on the hosts; its lock was in --save."""
    job = str(dead.get("job", ""))
    ended = hosts.ask("end", job=job, patience=5) if job else {}
    numbers = {host: answer["ended"] for host, answer in ended.items() if isinstance(answer, dict) and answer["ended"]}
    found = ", ".join(f"{number} processes on {host}" for host, number in numbers.items())
    launch.say(
        f"--save had the lock of job {job or '?'}, which is dead; {found + ' ended' if found else 'nothing left'}"
    )


def environment(job: Job, env_file: str | None) -> dict[str, str]:
    """Return the launcher's environment: ssh notices a lost host, and the job id reaches every process of the job."""
    if env_file is None:
        return {**os.environ, JOB: job.id}
    with open(env_file, "a", encoding="utf-8") as file:
        file.write(f"{JOB}={job.id}\n")
    # The port is DeepSpeed's to add. Not for the launcher's own processes: the job's are those on the hosts.
    outside = {name: value for name, value in os.environ.items() if name != JOB}
    return outside | {"PDSH_SSH_ARGS_APPEND": " ".join(ssh_arguments(None)), "DS_ENV_FILE": env_file}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
