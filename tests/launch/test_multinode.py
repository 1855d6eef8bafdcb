"""launch/pretrain_multinode.sh, run with a stand-in for deepspeed and pdsh that records what it was given."""

import shutil
import sys
from pathlib import Path

import pytest

from tests.support.launching import ODD, RUN, Bench


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


ARGUMENTS = ("--config", "config.yaml", "--hostfile", "hosts")


def test_exact_command(bench: Bench) -> None:
    result = bench.run("pretrain_multinode.sh", *ARGUMENTS, "--master-addr", "10.0.0.1", "--lr", "1e-3")
    assert result.argv == ["--hostfile", "hosts", "--master_addr", "10.0.0.1", *RUN, "--lr", "1e-3"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "config.yaml"], "--hostfile is missing"),
        (["--config", "config.yaml", "--hostfile", "nowhere"], "--hostfile nowhere: no such file"),
        (["--config", "config.yaml", "--hostfile", "config.yaml"], "config.yaml line 1: 'num-layers: 2': expected"),
        ([*ARGUMENTS, "--node-rank", "1"], "only together with --no-ssh"),
        ([*ARGUMENTS, "--no-ssh", "--master-addr", "a"], "--no-ssh needs --node-rank"),
        ([*ARGUMENTS, "--no-ssh", "--node-rank", "0"], "--no-ssh needs --master-addr"),
        ([*ARGUMENTS, "--no-ssh", "--node-rank", "2", "--master-addr", "a"], "--node-rank 2: expected 0 to 1"),
        ([*ARGUMENTS, "--no-ssh", "--node-rank", "x", "--master-addr", "a"], "--node-rank x: expected an integer"),
        ([*ARGUMENTS, "--no-ssh", "--node-rank", "0", "--master-addr", "a", "--ssh-port", "1"], "--ssh-port 1: noth"),
        ([*ARGUMENTS, "--ssh-port", "ssh"], "--ssh-port ssh: expected 1 to 65535"),
        ([*ARGUMENTS, "--ssh-port", "65536"], "--ssh-port 65536: expected 1 to 65535"),
        ([*ARGUMENTS, "--env", "A B=1"], "--env A B=1: expected NAME or NAME=VALUE"),
        ([*ARGUMENTS, "--env", "NOT_SET"], "the variable is not set here"),
    ],
)
def test_mistakes(bench: Bench, arguments: list[str], message: str) -> None:
    result = bench.run("pretrain_multinode.sh", *arguments)
    assert (result.code, result.calls) == (2, [])
    assert message in result.err
    assert len(result.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no line"),
        ("# node1 slots=8\n\n", "no line"),
        ("node1 slots=8\nnode2 lots=8\n", "hosts line 2: 'node2 lots=8': expected"),
        ("node1\n", "hosts line 1: 'node1': expected"),
        ("node1 slots=8x\n", "hosts line 1: 'node1 slots=8x': expected"),
        ("node1 slots=0\n", "hosts line 1: 'node1 slots=0': expected"),
        ("node1 slots = 8\n", "hosts line 1: 'node1 slots = 8': expected"),
        ("node1:8\n", "hosts line 1: 'node1:8': expected"),
        ("# both\nnode1 slots=8\nnode1 slots=8\n", "hosts line 3: node1 is in line 2 too"),
        ("node1 slots=8\r\nnode2 slots=8\r\n", "hosts line 1: it has an invisible carriage return"),
        ("\ufeffnode1 slots=8\n", "expected plain ASCII"),
        ("node1\u00a0slots=8\n", "expected plain ASCII"),
    ],
)
@pytest.mark.parametrize("ssh", [[], ["--no-ssh", "--node-rank", "0", "--master-addr", "a"]])
def test_mistakes_in_the_hostfile(bench: Bench, ssh: list[str], content: str, message: str) -> None:
    """DeepSpeed ends in a traceback and exit code 1 at most of them, and takes 8x for 8."""
    (bench.folder / "hosts").write_bytes(content.encode())
    result = bench.run("pretrain_multinode.sh", *ARGUMENTS, *ssh)
    assert (result.code, result.calls) == (2, [])
    assert message in result.err
    assert len(result.err.splitlines()) == 1


@pytest.mark.parametrize(
    "content",
    [
        "node1 slots=8",
        "  node1\tslots=8  \n",
        "# für alle\r\n\nnode1 slots=8 # the first\nnode2 slots=8 max_slots=8\n",
    ],
)
def test_hostfiles_that_deepspeed_reads(bench: Bench, content: str) -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    (bench.folder / "hosts").write_bytes(content.encode())
    assert set(fetch_hostfile(str(bench.folder / "hosts")).values()) == {8}
    assert bench.run("pretrain_multinode.sh", *ARGUMENTS).code == 0


def test_logs_of_each_machine_have_a_folder(bench: Bench) -> None:
    """pdsh puts the machine's name for %h."""
    result = bench.run("pretrain_multinode.sh", *ARGUMENTS, "--log-dir", "logs/a")
    assert result.argv == ["--hostfile", "hosts", "--enable_each_rank_log", "logs/a/%h", *RUN]
    refused = bench.run("pretrain_multinode.sh", *ARGUMENTS, "--log-dir", "my logs")
    assert (refused.code, len(refused.calls)) == (2, 1)
    assert "--log-dir my logs: a remote shell would take it apart" in refused.err


def test_one_host_is_reached_over_ssh_too(bench: Bench) -> None:
    """DeepSpeed alone would start its ranks on the launching machine."""
    (bench.folder / "hosts").write_text("node1 slots=8\n")
    result = bench.run("pretrain_multinode.sh", *ARGUMENTS)
    assert result.argv == ["--hostfile", "hosts", "--force_multi", *RUN]


def test_ssh_port(bench: Bench) -> None:
    from deepspeed.launcher.runner import parse_args

    result = bench.run("pretrain_multinode.sh", *ARGUMENTS, "--ssh-port=2222", "--lr", "1e-3")
    assert result.argv == ["--hostfile", "hosts", "--ssh_port", "2222", *RUN, "--lr", "1e-3"]
    assert parse_args(result.argv).ssh_port == 2222


def test_pdsh_missing(bench: Bench) -> None:
    (bench.bin / "pdsh").unlink()
    path = f"{bench.bin}:{Path(sys.executable).parent}:/bin"
    if shutil.which("pdsh", path=path):
        pytest.skip("pdsh is installed beside the system's own commands")
    result = bench.run("pretrain_multinode.sh", *ARGUMENTS, PATH=path)
    assert result.code == 2
    assert "pdsh is not on PATH" in result.err


@pytest.mark.parametrize("word", ['{"q":1}', "$HOME", "a'b", "x;y", "*.bin", "~/x", "%h", "a\nb", "", "`id`"])
def test_arguments_that_a_remote_shell_would_change_are_refused(bench: Bench, word: str) -> None:
    result = bench.run("pretrain_multinode.sh", *ARGUMENTS, "--data-path", word)
    assert (result.code, result.calls) == (2, [])
    assert "would not survive the remote shell" in result.err


def test_blanks_survive(bench: Bench) -> None:
    """DeepSpeed puts such an argument into double quotes itself."""
    result = bench.run("pretrain_multinode.sh", *ARGUMENTS, "--data-path", "0.3 a b", "--lr", "-1e-3")
    assert result.argv[-4:] == ["--data-path", "0.3 a b", "--lr", "-1e-3"]


def test_environment_file(bench: Bench) -> None:
    (bench.folder / ".deepspeed_env").write_text("# a comment\n\nFROM_FILE=a=b\n")
    result = bench.run(
        "pretrain_multinode.sh",
        *ARGUMENTS,
        *("--env", "MINE=x y", "--env", "HOME"),
        NCCL_SOCKET_IFNAME="^lo,docker",
        GLOO_SOCKET_IFNAME="eth0",
        WANDB_API_KEY="secret",
    )
    assert result.code == 0, result.err
    lines = (result.calls[0]["env_file"] or "").splitlines()
    jobs = [line for line in lines if line.startswith("MEGATRON_PATCH_JOB=")]
    assert len(jobs) == 1 and jobs[0] in result.out.replace("> job ", "MEGATRON_PATCH_JOB=")
    lines.remove(jobs[0])
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
def test_values_that_a_remote_shell_would_change_are_refused(bench: Bench, value: str) -> None:
    result = bench.run("pretrain_multinode.sh", *ARGUMENTS, NVTE_SETTING=value)
    assert (result.code, result.calls) == (2, [])
    assert "environment: NVTE_SETTING=" in result.err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("export A=1\n", ".deepspeed_env line 1: export A=1 would not survive"),
        ("A=1\n# B\nFOO\n", ".deepspeed_env line 3: 'FOO': expected NAME=VALUE"),
        ("A=1\r\n", ".deepspeed_env line 1: it has an invisible carriage return"),
        ("\ufeffA=1\n", ".deepspeed_env line 1: $'\\357\\273\\277A=1': expected plain ASCII"),
        ("A=$HOME\n", ".deepspeed_env line 1: A=$HOME would not survive"),
    ],
)
def test_bad_line_in_the_users_file(bench: Bench, content: str, message: str) -> None:
    (bench.folder / ".deepspeed_env").write_bytes(content.encode())
    result = bench.run("pretrain_multinode.sh", *ARGUMENTS)
    assert (result.code, result.calls) == (2, [])
    assert message in result.err
    assert len(result.err.splitlines()) == 1


def test_without_ssh(bench: Bench) -> None:
    """No shell in between: odd arguments pass, the environment is inherited, pdsh is not needed."""
    (bench.bin / "pdsh").unlink()
    here = ["--no-ssh", "--node-rank", "1", "--master-addr", "a", "--master-port", "29600"]
    result = bench.run("pretrain_multinode.sh", *ARGUMENTS, *here, "--env", "MINE=$x", *ODD)
    node = ["--hostfile", "hosts", "--no_ssh", "--node_rank", "1", "--master_addr", "a", "--master_port", "29600"]
    assert result.argv == [*node, *RUN, *ODD]
    assert result.calls[0]["env"]["MINE"] == "$x"
    assert "DS_ENV_FILE" not in result.calls[0]["env"]
