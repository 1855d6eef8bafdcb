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
from collections.abc import Mapping, Sequence

from megatron_patch.config import Settings
from megatron_patch.config.arguments import add_arguments
from megatron_patch.entry.exits import exit_code
from megatron_patch.entry.run import split_command_line, yaml_arguments
from megatron_patch.errors import ConfigError
from megatron_patch.files.run_json import JOB, Status
from megatron_patch.files.yaml_flags import load_yaml
from megatron_patch.hosts.check import Wanted, examine, greet, read_hostfile, take_save
from megatron_patch.hosts.job import Job, Launch
from megatron_patch.hosts.remote import Hosts, ssh_arguments
from megatron_patch.hosts.restarts import TRACKER, Ended, check_restarts, supervised


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
    parser.add_argument("--one-of-several", action="store_true", help="others are started elsewhere, not over ssh")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="after --")
    args = parser.parse_args(argv)
    try:
        return exit_code(lambda: _restarted(args), interrupted="nothing was started")
    finally:
        if args.env_file:
            with contextlib.suppress(OSError):
                os.remove(args.env_file)


def _restarted(args: argparse.Namespace) -> int:
    if args.restarts:
        _, save, load, _ = where_it_writes(_run_of(args))
        if args.one_of_several:
            fix = "drop it, and start again what your scheduler restarts"
            raise ConfigError("--restarts", args.restarts, "one launching side for all hosts, not --no-ssh", fix)
        check_restarts(args.restarts, save, load)

    def say(text: str) -> None:
        print(f"{args.name}: {text}", file=sys.stderr, flush=True)

    return supervised(lambda: supervise(args), args.restarts, say, time.sleep)


def _command(args: argparse.Namespace) -> list[str]:
    return list(args.command[1:] if args.command[:1] == ["--"] else args.command)


def _run_of(args: argparse.Namespace) -> list[str]:
    """What follows ``megatron_patch run``."""
    command = _command(args)
    return command[command.index("megatron_patch") + 2 :]


def where_it_writes(run: Sequence[str]) -> tuple[str, str | None, str | None, str | None]:
    """Return config, --save, --load and the folder of run.json (None: none is written) of what follows ``run``.

    Raises:
        ConfigError: the config cannot be read, or the script is missing.
    """
    config, _, arguments = split_command_line(run)
    parser = add_arguments(argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False))
    for flag in ("--save", "--load", "--tensorboard-dir"):
        parser.add_argument(flag)
    parser.add_argument("--skip-train", action="store_true")
    flags = load_yaml(config) if config else {}
    # What is wrong with a flag, the run itself says best: here it is as if it were not there.
    with contextlib.suppress(argparse.ArgumentError, ConfigError):
        known, _ = parser.parse_known_args([*yaml_arguments(flags, parser, arguments), *arguments])
        settings = Settings.of(vars(known))
        writes = settings.active and not known.skip_train
        return config or "", known.save, known.load, settings.metrics.directory if writes else None
    return config or "", None, None, None


def supervise(args: argparse.Namespace) -> Ended:
    """Start the command and see it to its end.

    Raises:
        ConfigError: a host cannot be reached or differs, --save is taken or not one place: nothing was started.
    """
    config, save, _, metrics = where_it_writes(_run_of(args))
    if args.one_of_several:
        save = metrics = None  # whose they are, this machine alone cannot say
    names = read_hostfile(args.hostfile) if args.hostfile else (socket.gethostname(),)
    now = datetime.datetime.now(datetime.UTC)
    job = Job(
        id=f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(4)}",
        hosts=names,
        save=save and os.path.abspath(save),
        metrics=metrics and os.path.abspath(metrics),
        log_dir=args.log_dir and os.path.abspath(args.log_dir),
    )
    hosts = Hosts(names, args.ssh_port, job.id, local=not args.hostfile)
    try:
        launch = Launch(job, hosts, args.name)
        greet(hosts)
        if args.hostfile and not args.no_doctor:
            doctor(hosts, Wanted(os.getcwd(), (config,), job.save, args.master_port), args.name)
        if job.save:
            record = {"job": job.id, "host": socket.gethostname(), "pid": os.getpid(), "started": f"{now:%F %T} UTC"}
            if (dead := take_save(hosts, job.save, record)) is not None:
                clean_up(hosts, launch, dead)
        print(f"> job {job.id} on {' '.join(names)}", flush=True)
        code = launch.run(_command(args), environment(job, args.env_file))
        found = launch.record() if args.restarts else None
        tracker = checkpointed(hosts, job.save) if args.restarts and job.save else None
        return Ended(code, found is not None and found[1].stands(Status.DIVERGED), tracker)
    finally:
        hosts.close()


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
