"""megatron_patch.hosts without a second host: agents on this machine, locks, what counts as the first error."""

import os
import queue
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_patch.entry.asked import Asked
from megatron_patch.errors import ConfigError
from megatron_patch.files import run_json
from megatron_patch.hosts import processes, save_lock
from megatron_patch.hosts.check import Wanted, examine, greet, read_hostfile, see, take_save
from megatron_patch.hosts.first_error import FirstError
from megatron_patch.hosts.job import full
from megatron_patch.hosts.remote import Event, Hosts, Lost
from megatron_patch.hosts.save_lock import Lock
from tests.support.launching import Bench, running, wait_for_the_end
from tests.support.two_hosts import wait_for

ARGUMENTS = ("--config", "config.yaml", "--hostfile", "hosts")
# What a run leaves: the stand-in for deepspeed knows the job id from the file that DeepSpeed would read.
RECORD = """
import os
job = dict(line.split("=", 1) for line in call["env_file"].splitlines())["MEGATRON_PATCH_JOB"]
os.makedirs("s/transfer", exist_ok=True)
json.dump({"status": STATUS, "job": job, "iteration": 3}, open("s/transfer/run.json", "w"))
"""


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    pair = Hosts(["a", "b"], local=True)
    yield pair
    pair.close()


@pytest.fixture
def belonging() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts processes of a job, in a session of their own; those that a failed test leaves are killed."""
    started = []

    def start(job: str, shell: str = "exec sleep 5000", **more: str) -> subprocess.Popen[bytes]:
        environment = {"PATH": os.environ["PATH"], processes.JOB: job, **more}
        started.append(subprocess.Popen(["sh", "-c", shell], env=environment, start_new_session=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def event(hosts: Hosts, name: str) -> Event:
    """The next one of a name."""
    while True:
        found = hosts.events.get(timeout=1800)
        if isinstance(found, Event) and found.name == name:
            return found


def test_one_name_for_the_job_id() -> None:
    assert run_json.JOB == processes.JOB


class TestFirstError:
    @pytest.mark.parametrize(
        ("lines", "first"),
        [
            ([], "None"),
            (["a: all is well", "b: error rate: 3"], "None"),
            (["a: Traceback (most recent call last):", "a: KeyError: 'x'"], "a: KeyError: 'x'"),
            (["b: [rank1]: Exception: .idx and .bin not found"], "b: rank 1: Exception: .idx and .bin not found"),
            (["a: error: --lr -1: expected a positive number; correct it"], "a: error: --lr -1: expected a positive"),
            (["other: ValueError: not a host of ours"], "None"),
            (["ValueError: by the launcher itself"], "ValueError: by the launcher itself"),
            (
                [
                    "a: [rank0]: RuntimeError: [gloo] Connection closed by peer [10.77.0.2]:1",
                    "b: [launch.py:325:sigkill_handler] ['python'] exits with return code = -9",
                ],
                "b: a rank was ended by SIGKILL",
            ),
            (
                ["b: x exits with return code = -15", "a: x exits with return code = 1"],
                "b: a rank was ended by SIGTERM",
            ),
            (["b: x exits with return code = -6", "a: OSError: No space left on device"], "a: OSError: No space left"),
            (["a: RuntimeError: Timed out waiting 60000ms for recv operation"], "a: RuntimeError: Timed out waiting"),
            (["a: torch.OutOfMemoryError: CUDA out of memory.", "b: ValueError: x"], "a: torch.OutOfMemoryError: CUDA"),
        ],
    )
    def test_of_what_is_printed(self, lines: list[str], first: str) -> None:
        errors = FirstError(["a", "b"])
        for line in lines:
            errors.read(f"{line}\n")
        assert str(errors.first).startswith(first)

    def test_what_was_handled_is_forgotten(self) -> None:
        errors = FirstError(["a"])
        errors.read("a: ImportError: no apex, using torch's")
        for number in range(30):
            errors.read(f"a:  iteration {number:8d}/ 100 | lm loss: 1.0")
        assert errors.first is None
        errors.read("a: ValueError: x")
        for number in range(3):
            errors.read(f"a:  iteration {number:8d}/ 100 | lm loss: 1.0")
        assert str(errors.first) == "a: ValueError: x"

    def test_pdsh_tells_which_host_failed(self) -> None:
        errors = FirstError(["a", "b"])
        errors.read("pdsh@a: b: ssh exited with exit code 255\n")
        assert (errors.failed, errors.first) == ([("b", 255)], None)


class TestLock:
    @pytest.fixture(autouse=True)
    def quick(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(save_lock, "BEAT", 0.2)

    def test_it_is_given_back(self, tmp_path: Path) -> None:
        lock = Lock(str(tmp_path / "s"), {"job": "one"})
        assert lock.take()["held"]
        lock.leave()
        assert list((tmp_path / "s").iterdir()) == []

    def test_a_living_job_keeps_it(self, tmp_path: Path) -> None:
        first = Lock(str(tmp_path), {"job": "one", "host": "a"})
        first.take()
        done = threading.Event()
        beating = threading.Thread(target=lambda: [first.beat() for _ in iter(lambda: done.wait(0.01), True)])
        beating.start()
        try:
            second = Lock(str(tmp_path), {"job": "two"})
            taken = second.take()
            assert (taken["held"], taken["other"]["job"], taken["other"]["host"]) == (False, "one", "a")
            second.leave()
        finally:
            done.set()
            beating.join()
        assert Path(first.path).exists()

    @pytest.mark.parametrize("content", ['{"job": "one", "beat": 7}', "", "{"])
    def test_a_dead_job_s_is_taken_over(self, tmp_path: Path, content: str) -> None:
        (tmp_path / save_lock.LOCK).write_text(content)
        second = Lock(str(tmp_path), {"job": "two"})
        taken = second.take()
        other = {"job": "one", "beat": 7} if "7" in content else {}
        assert taken == {"held": False, "other": other, "dead": content}
        assert second.take(over=content)["held"]
        second.beat()
        assert Path(second.path).stat().st_size == save_lock.SIZE
        second.leave()
        assert list(tmp_path.iterdir()) == []

    def test_one_that_lives_after_all_is_not_taken_over(self, tmp_path: Path) -> None:
        (tmp_path / save_lock.LOCK).write_text('{"job": "one", "beat": 8}')
        second = Lock(str(tmp_path), {"job": "two"})
        assert second.take(over='{"job": "one", "beat": 7}')["held"] is False
        second.leave()
        assert "one" in Path(second.path).read_text()

    def test_one_that_was_taken_over_is_not_taken_back(self, tmp_path: Path) -> None:
        first, second = (Lock(str(tmp_path), {"job": job}) for job in ("one", "two"))
        first.take()
        second.take(over=Path(first.path).read_text())
        first.beat()
        first.leave()
        assert '"two"' in Path(second.path).read_text()

    def test_of_several_that_take_it_over_one_has_it(self, tmp_path: Path) -> None:
        (tmp_path / save_lock.LOCK).write_text("{}")
        taken: queue.Queue[bool] = queue.Queue()
        takers = [
            threading.Thread(target=lambda n=n: taken.put(Lock(str(tmp_path), {"job": str(n)}).take(over="{}")["held"]))
            for n in range(4)
        ]
        for taker in takers:
            taker.start()
        for taker in takers:
            taker.join()
        assert sum(taken.queue) == 1


def test_a_process_that_becomes_another_program_is_not_missed(
    belonging: Callable[..., subprocess.Popen[bytes]],
) -> None:
    """In the middle of an execve it has no environment; it has been asked for by then: `Popen` returns before that."""
    job = f"job-{os.getpid()}"
    for _ in range(150):
        process = belonging(job)
        for _ in range(3):  # sh, and then sleep
            assert process.pid in [found.pid for found in processes.processes(job)]
        process.kill()
        process.wait()


class TestAgents:
    def test_they_end_a_job_and_no_other(self, hosts: Hosts, belonging: Callable[..., subprocess.Popen[bytes]]) -> None:
        deaf = "trap '' TERM; touch deaf; while :; do sleep 0.1; done"
        job = f"job-{os.getpid()}"
        mine = [belonging(job, RANK="0"), belonging(job, deaf.replace("touch deaf; ", ""))]
        other = belonging(f"{job}-other")
        answers = hosts.ask("end", job=job, patience=1)
        assert [answer["left"] for answer in answers.values()] == [[], []]
        assert [process.wait() < 0 for process in mine] == [True, True]
        assert running(other.pid)

    def test_a_job_does_not_outlive_them(self, hosts: Hosts, belonging: Callable[..., subprocess.Popen[bytes]]) -> None:
        job = f"job-{os.getpid()}"
        hosts.ask("watch", job=job)
        process = belonging(job)
        hosts.close()
        assert process.wait(timeout=1800) < 0

    def test_nor_a_silence(self, hosts: Hosts, belonging: Callable[..., subprocess.Popen[bytes]]) -> None:
        """As where the cable was pulled."""
        job = f"job-{os.getpid()}"
        process = belonging(job)
        hosts.ask("watch", job=job, silence=0.1)
        assert process.wait(timeout=1800) < 0
        assert event(hosts, "lost").host in ("a", "b")

    def test_what_a_launcher_leaves_is_told_and_ended(
        self, hosts: Hosts, belonging: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
    ) -> None:
        hosts.ask("watch", job="left")
        launcher = belonging("left", f"RANK=3 sleep 5000 & echo $! > {tmp_path}/pid; exec sleep 5000")
        (tmp_path / "logs").mkdir()
        (tmp_path / "logs/1_rank3.log").touch()
        # What an agent reads is of ranks that it has seen, and it saw the launcher at the same time.
        where = {"folder": str(tmp_path / "logs"), "since": 0.0}
        wait_for(lambda: all(len(logs) for logs in hosts.ask("logs", **where).values()), "both agents' look")
        launcher.kill()
        launcher.wait()
        assert event(hosts, "orphans").particulars["ranks"] == ["3"]
        wait_for_the_end(int((tmp_path / "pid").read_text()))

    def test_a_stopped_rank_is_told(self, hosts: Hosts, belonging: Callable[..., subprocess.Popen[bytes]]) -> None:
        job = f"job-{os.getpid()}"
        hosts.ask("watch", job=job)
        process = belonging(job, RANK="5")
        os.kill(process.pid, signal.SIGSTOP)
        assert dict(event(hosts, "stopped").particulars) == {"pid": process.pid, "rank": "5"}
        os.kill(process.pid, signal.SIGCONT)
        assert event(hosts, "goes_on").particulars["pid"] == process.pid

    def test_a_full_disk_is_told(self, hosts: Hosts, tmp_path: Path) -> None:
        assert full(hosts, "/proc/s") == "; a has 0 MiB free at --save /proc/s; b has 0 MiB free at --save /proc/s"
        assert full(hosts, str(tmp_path)) == ""

    def test_a_question_that_cannot_be_answered(self, hosts: Hosts) -> None:
        first = hosts.first
        with pytest.raises(OSError, match="/nowhere/x: No such file"):
            first.answer(first.ask("write", path="/nowhere/x", text=""))
        hosts.close()
        with pytest.raises(Lost):
            first.answer(first.ask("alive"))


class TestBeforeTheStart:
    def test_equal_hosts(self, hosts: Hosts, tmp_path: Path) -> None:
        (tmp_path / "c.yaml").touch()
        greet(hosts)
        found = examine(hosts, Wanted(str(tmp_path), ("c.yaml",), str(tmp_path / "s"), 0))
        assert [str(trouble) for trouble in found if trouble.fatal] == []
        assert take_save(hosts, str(tmp_path / "s"), {"job": "one"}) is None
        assert [path.name for path in (tmp_path / "s").iterdir()] == [save_lock.LOCK]

    def test_a_port_that_is_taken(self, hosts: Hosts, tmp_path: Path) -> None:
        import socket

        with socket.create_server(("", 0)) as taken:
            port = taken.getsockname()[1]
            found = examine(hosts, Wanted(str(tmp_path), port=port))
        assert [t.host for t in found if f"nobody can listen on port {port} (Address already in use)" in t.text] == [
            "a"
        ]

    def test_no_such_folder(self, hosts: Hosts) -> None:
        found = examine(hosts, Wanted("/nowhere", port=0))
        assert [trouble.host for trouble in found if "no folder /nowhere" in trouble.text] == ["a", "b"]

    def test_save_that_cannot_be_written_to(self, hosts: Hosts) -> None:
        with pytest.raises(ConfigError, match=r"--save /proc/s: expected a folder that a can write to"):
            take_save(hosts, "/proc/s", {"job": "one"})

    def test_a_lock_that_is_seen(self, hosts: Hosts, tmp_path: Path) -> None:
        see(hosts, str(tmp_path))
        assert list(tmp_path.iterdir()) == []

    def test_a_lock_that_looks_dead_of_a_job_with_an_agent(
        self, hosts: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As a network file system that shows old content would have it."""
        living = Hosts(["a"], job="living", local=True)
        try:
            greet(living)
            (tmp_path / save_lock.LOCK).write_text('{"job": "living", "host": "x"}')
            with pytest.raises(ConfigError, match=r"a folder that no other run writes to, and job living of x"):
                take_save(hosts, str(tmp_path), {"job": "one"})
        finally:
            living.close()

    def test_hostfile(self, tmp_path: Path) -> None:
        (tmp_path / "h").write_text("# two\nb slots=1\n\na slots=2 # second\n")
        assert list(read_hostfile(str(tmp_path / "h")).items()) == [("b", 1), ("a", 2)]

    @pytest.mark.parametrize(
        ("yaml", "flags", "save", "metrics"),
        [
            ("lr: 1", [], None, None),
            ("save: s", [], "s", None),
            ("save: s\nalignment-interval: 5", [], "s", "s/transfer"),
            ("save: s\nalignment-interval: 5", ["--save", "t", "--metrics-dir=m"], "t", "m"),
            ("alignment-interval: 5", ["--tensorboard-dir", "tb"], None, "tb/transfer"),
            ("save: s\nwidth-scaling: sqrt", ["--skip-train"], "s", None),
        ],
    )
    def test_where_a_run_writes(
        self, tmp_path: Path, yaml: str, flags: list[str], save: str | None, metrics: str | None
    ) -> None:
        config = tmp_path / "c.yaml"
        config.write_text(yaml)
        asked = Asked.of(["--config", str(config), *flags])
        assert (asked.config, asked.save, asked.load, asked.metrics) == (str(config), save, None, metrics)


class TestVerdict:
    """With stand-ins for ssh and deepspeed."""

    def start(self, bench: Bench, then: str, *flags: str, **env: str) -> tuple[int, str]:
        result = bench.run("pretrain_multinode.sh", *ARGUMENTS, "--no-doctor", *flags, THEN=then, **env)
        return result.code, (result.err.splitlines() or [""])[-1].removeprefix("pretrain_multinode.sh: ")

    def test_finished(self, bench: Bench) -> None:
        then = RECORD.replace("STATUS", "'finished'")
        assert self.start(bench, then, "--save", "s", "--alignment-interval", "5") == (0, "")
        assert not (bench.folder / "s" / save_lock.LOCK).exists()

    def test_stopped_as_asked_for(self, bench: Bench) -> None:
        then = RECORD.replace("STATUS", "'stopped'")
        code, last = self.start(bench, then, "--save", "s", "--alignment-interval", "5")
        assert code == 0
        assert "Megatron left by itself before the end" in last and "at iteration 3" in last

    @pytest.mark.parametrize("status", ["running", "failed", "diverged"])
    def test_not_finished(self, bench: Bench, status: str) -> None:
        then = RECORD.replace("STATUS", repr(status))
        code, last = self.start(bench, then, "--save", "s", "--alignment-interval", "5")
        assert (code, f"status {status} at iteration 3" in last) == (1, True)

    def test_the_record_of_another_start(self, bench: Bench) -> None:
        then = RECORD.replace("STATUS", "'finished'").replace('"job": job', '"job": "another"')
        code, last = self.start(bench, then, "--save", "s", "--alignment-interval", "5")
        assert (code, "run.json is not of this start" in last) == (1, True)

    def test_without_a_record_the_launcher_is_believed(self, bench: Bench) -> None:
        assert self.start(bench, "") == (0, "")

    def test_a_word_that_looks_like_an_error_fails_nothing(self, bench: Bench) -> None:
        assert self.start(bench, "print('node1: ImportError: no apex, using torch')") == (0, "")

    def test_a_code_and_its_reason(self, bench: Bench) -> None:
        then = "print('node2: [rank9]: ValueError: no such data', flush=True); sys.exit(3)"
        assert self.start(bench, then) == (3, "failed, exit code 3: node2: rank 9: ValueError: no such data")

    def test_a_launcher_that_waits_for_ever_after_a_failure(self, bench: Bench) -> None:
        then = "import time; print('pdsh@x: node2: ssh exited with exit code 7', file=sys.stderr, flush=True);"
        code, last = self.start(bench, then + "time.sleep(5000)")
        assert (code, last) == (7, "failed, exit code 7: node2: its command ended with exit code 7")

    def test_a_reason_in_the_log_of_a_rank(self, bench: Bench) -> None:
        rank = "open('logs/node1/1_rank9.log', 'w').write('x\\\\nValueError: deep\\\\n'); import time; time.sleep(5000)"
        then = (
            "import os, subprocess, time; os.makedirs('logs/node1'); job = call['env_file'].split('_JOB=')[1].strip();"
            f'subprocess.Popen([sys.executable, "-c", "{rank}"],'
            " env=os.environ | {'MEGATRON_PATCH_JOB': job, 'RANK': '9'}); time.sleep(4); sys.exit(1)"
        )
        code, last = self.start(bench, then, "--log-dir", "logs")
        assert (code, last) == (1, "failed, exit code 1: node1: rank 9: ValueError: deep")

    def test_nobody_reads(self, bench: Bench) -> None:
        then = "import time\nwhile True: print('x' * 1000, flush=True); time.sleep(0.01)"
        command = ["sh", "-c", '"$@" | head -n 3', "sh"]
        script = Path(__file__).parents[2] / "launch/pretrain_multinode.sh"
        done = subprocess.run(
            [*command, str(script), *ARGUMENTS, "--no-doctor"],
            cwd=bench.folder,
            env=bench.environment(THEN=then),
            capture_output=True,
            text=True,
            timeout=1800,
        )
        assert "nobody reads the output any more" in done.stderr

    def test_an_unreachable_host(self, bench: Bench) -> None:
        bench.command("ssh", "import sys\nsys.exit('ssh: connect to host: No route to host')\n")
        result = bench.run("pretrain_multinode.sh", *ARGUMENTS)
        assert (result.code, result.calls) == (2, [])
        assert result.err.startswith("error: --hostfile node1: expected a host that answers over ssh")
        assert "No route to host" in result.err and "node2 neither" in result.err
