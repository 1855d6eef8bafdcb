"""A run across two hosts, over ssh and pdsh, is the run on one host: every printed loss, every line of metrics."""

import json
import re
from pathlib import Path

import pytest

from tests.support.faulty_hosts import Start
from tests.support.two_hosts import LAUNCH, TINY, TwoHosts, environment

METRICS = ["alignment.jsonl", "equilibrium.jsonl", "sublayers.jsonl"]
LAYOUTS = {
    "tensor": ["--tensor-model-parallel-size", "2"],
    "data": ["--use-distributed-optimizer"],
}


def printed(output: str) -> list[tuple[str, str, str]]:
    """Iteration, loss and gradient norm of every step, as printed."""
    return re.findall(r"iteration +(\d+)/.* lm loss: (\S+) .* grad norm: (\S+) ", output)


def on_one_host(hosts: TwoHosts, folder: Path, *flags: str) -> str:
    """Train with two ranks on nodea, whose ports are its own, and return what was printed."""
    command = [str(LAUNCH / "pretrain.sh"), "--num-gpus", "2", "--config", "tiny.yaml", *flags]
    return hosts.a.run(*command, cwd=folder, env=environment())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_hosts_train_as_one_does(hosts: TwoHosts, tmp_path: Path, layout: str) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    flags = LAYOUTS[layout]
    across = hosts.a.run(
        *(
            str(LAUNCH / "pretrain_multinode.sh"),
            "--hostfile",
            str(hosts.hostfile),
            "--config",
            "tiny.yaml",
            *flags,
            "--save",
            "across",
        ),
        cwd=tmp_path,
        env=environment(),
    )
    one = on_one_host(hosts, tmp_path, *flags, "--save", "one")
    assert re.search(r"^nodea: ", across, re.MULTILINE) and re.search(r"^nodeb: ", across, re.MULTILINE)
    steps = printed(across)
    assert [iteration for iteration, _, _ in steps] == [str(number + 1) for number in range(6)]
    assert steps == printed(one)
    for name in METRICS:
        lines = (tmp_path / "across/transfer" / name).read_bytes()
        assert lines.count(b"\n") >= 3
        assert lines == (tmp_path / "one/transfer" / name).read_bytes()
    # Both shards are in the one folder, and nothing of the run is left on either host.
    assert len(list((tmp_path / "across/iter_0000006").glob("*.distcp"))) >= 2
    assert [words for host in hosts.both for _, words, _ in host.processes() if "megatron" in words] == []


def test_a_killed_run_is_resumed_as_if_nothing_had_happened(hosts: TwoHosts, tmp_path: Path) -> None:
    """Megatron's own processes: the one that its checkpoint writer leaves behind holds the ssh session open."""
    often = ["--save-interval", "50", "--alignment-interval", "50", "--spectral-interval", "50"]
    flags = ["--train-iters", "20000", "--lr-decay-iters", "20000", *often]
    first = Start(hosts, tmp_path, "--save", "s", "--load", "s", *flags, real=True)
    first.until(lambda: (tmp_path / "s/latest_checkpointed_iteration.txt").exists()).kill("rank", hosts.b)
    assert first.ends() not in (0, None)
    assert "nodeb: a rank was ended by SIGKILL" in first.last, first.output
    first.clean()
    second = Start(hosts, tmp_path, "--save", "s", "--load", "s", *flags, "--exit-interval", "200", real=True)
    assert second.ends() == 0, second.output
    assert "Megatron left by itself before the end" in second.last
    reached = json.loads((tmp_path / "s/transfer/run.json").read_text())["iteration"]
    on_one_host(
        hosts, tmp_path, "--tensor-model-parallel-size", "2", "--save", "one", *flags, "--exit-interval", str(reached)
    )
    for name in METRICS:
        lines = (tmp_path / "s/transfer" / name).read_bytes()
        assert lines.count(b"\n") >= 4
        assert lines == (tmp_path / "one/transfer" / name).read_bytes()
