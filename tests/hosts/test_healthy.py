"""A run across two hosts, over ssh and pdsh, is the run on one host: every printed loss, every line of metrics."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.support.two_hosts import LAUNCH, TINY, TwoHosts, environment

METRICS = ["alignment.jsonl", "equilibrium.jsonl", "sublayers.jsonl"]
LAYOUTS = {
    "tensor": ["--tensor-model-parallel-size", "2"],
    "data": ["--use-distributed-optimizer"],
}


def printed(output: str) -> list[tuple[str, str, str]]:
    """Iteration, loss and gradient norm of every step, as printed."""
    return re.findall(r"iteration +(\d+)/.* lm loss: (\S+) .* grad norm: (\S+) ", output)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_hosts_train_as_one_does(hosts: TwoHosts, tmp_path: Path, layout: str) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    flags = ["--config", "tiny.yaml", *LAYOUTS[layout]]
    across = hosts.a.run(
        *(str(LAUNCH / "pretrain_multinode.sh"), "--hostfile", str(hosts.hostfile), *flags, "--save", "across"),
        cwd=tmp_path,
        env=environment(),
    )
    one = subprocess.run(
        [str(LAUNCH / "pretrain.sh"), "--num-gpus", "2", "--master-port", "29517", *flags, "--save", "one"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert one.returncode == 0, one.stdout + one.stderr
    assert re.search(r"^nodea: ", across, re.MULTILINE) and re.search(r"^nodeb: ", across, re.MULTILINE)
    steps = printed(across)
    assert [iteration for iteration, _, _ in steps] == [str(number + 1) for number in range(6)]
    assert steps == printed(one.stdout)
    for name in METRICS:
        lines = (tmp_path / "across/transfer" / name).read_bytes()
        assert lines.count(b"\n") >= 3
        assert lines == (tmp_path / "one/transfer" / name).read_bytes()
    # Both shards are in the one folder, and nothing of the run is left on either host.
    assert len(list((tmp_path / "across/iter_0000006").glob("*.distcp"))) >= 2
    assert [words for host in hosts.both for _, words, _ in host.processes() if "megatron" in words] == []
