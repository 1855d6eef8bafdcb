"""megatron-patch doctor, asked of two hosts."""

import sys
from pathlib import Path

from tests.support.faulty_hosts import ENDLESS, Start
from tests.support.two_hosts import Host, TwoHosts, environment


def doctor(hosts: TwoHosts, folder: Path, *more: str) -> str:
    """What it prints, and its exit code as the last word."""
    command = [sys.executable, "-m", "megatron_patch", "doctor", "--hostfile", str(hosts.hostfile), *more]
    return hosts.a.run("sh", "-c", '"$@"; echo $?', "sh", *command, cwd=folder, env=environment(), check=False)


def test_healthy_hosts(hosts: TwoHosts, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "c.yaml").write_text("cpu: true\n")
    said = doctor(hosts, tmp_path, "--config", "c.yaml", "--save", "s").splitlines()
    found = [line for line in said if line.startswith("node") and "MiB free" not in line]
    assert set(found) <= {"nodea: nothing found", "nodeb: nothing found"}
    assert f"--save {tmp_path}/s is one place for all hosts" in said
    assert said[-1] == "0"


def test_a_lost_host_and_one_without_the_folder(hosts: TwoHosts, tmp_path: Path) -> None:
    folder = tmp_path / "above/only_here"
    folder.mkdir(parents=True)
    hosts.b.run("mount", "-t", "tmpfs", "tmpfs", str(folder.parent))
    said = doctor(hosts, folder)
    assert f"nodeb: no folder {folder}" in said
    assert said.endswith("1\n")
    hosts.cut()
    said = doctor(hosts, folder)
    assert "nodea: warning: there is no nvidia-smi, and slots=1 GPUs are asked for\n" in said, "and nothing else"
    assert "nodeb: ssh: connect to host nodeb port 22: " in said
    assert said.endswith("1\n")


def test_a_job_is_seen_and_ended(hosts: TwoHosts, tmp_path: Path) -> None:
    start = Start(hosts, tmp_path, "--save", "s", *ENDLESS).trains()
    said = doctor(hosts, hosts.folder, "--master-port", "29600")
    (job,) = {line.split("job ")[1].split()[0] for line in said.splitlines() if "processes of the job " in line}
    assert said.count("processes of the job ") == 2
    said = doctor(hosts, hosts.folder, "--end", job)
    assert said.count("processes ended") == 2
    assert start.ends() not in (0, None)
    start.clean()


# Two GPUs of eight are somebody else's on nodeb, which has one less than its slots, and of another kind.
SMI = """#!/bin/sh
[ "$*" = "--query-gpu=driver_version,name,memory.total,memory.used --format=csv,noheader,nounits" ] || exit 9
"""
KIND = "570.1, NVIDIA H100, 81559, {}"


def fake_gpus(host: Host, used: list[int], kind: str = KIND, more: str = "") -> None:
    """Put an nvidia-smi on a host, where commands over ssh do not have it on PATH."""
    lines = "".join(f"echo '{kind.format(mebibytes)}'\n" for mebibytes in used)
    host.run("mount", "-t", "tmpfs", "tmpfs", "/opt")
    host.run(
        "sh",
        "-c",
        "mkdir /opt/bin && cat > /opt/bin/nvidia-smi && chmod +x /opt/bin/nvidia-smi",
        input=SMI + lines + more,
    )


def test_gpus_against_slots(hosts: TwoHosts, tmp_path: Path) -> None:
    hosts.hostfile.write_text("nodea slots=4\nnodeb slots=4\n")
    (tmp_path / "c.yaml").write_text("num-layers: 2\n")
    fake_gpus(hosts.a, [5, 5, 5, 5, 5])
    fake_gpus(hosts.b, [5, 71000, 5], KIND.replace("H100, 81559", "A100, 40960").replace("570", "535"))
    said = doctor(hosts, tmp_path, "--config", "c.yaml").splitlines()
    assert "nodea: nothing found" in said
    assert [line for line in said if line.startswith("nodeb: ")] == [
        "nodeb: slots=4 in the hostfile, and nvidia-smi lists 3 GPUs",
        "nodeb: warning: GPU 1 (NVIDIA A100) has 71,000 of 40,960 MiB in use: by another job?",
        "nodeb: warning: its GPUs are NVIDIA A100 with 40960 MiB, on nodea NVIDIA H100 with 81559 MiB",
        "nodeb: warning: NVIDIA driver 535.1, on nodea 570.1",
    ]
    assert said[-1] == "1"
    # A run that needs none is not asked for them.
    (tmp_path / "c.yaml").write_text("cpu: true\n")
    assert doctor(hosts, tmp_path, "--config", "c.yaml").endswith("0\n")


def test_gpus_that_fail(hosts: TwoHosts, tmp_path: Path) -> None:
    fake_gpus(hosts.a, [5])
    fake_gpus(hosts.b, [], more="echo 'Unable to determine the device handle for GPU0: Unknown Error'; exit 255\n")
    said = doctor(hosts, tmp_path).splitlines()
    text = "nvidia-smi fails with exit code 255: Unable to determine the device handle for GPU0: Unknown Error"
    assert f"nodeb: {text}, and slots=1 GPUs are asked for" in said
    assert said[-1] == "1"


def test_data_that_differs(hosts: TwoHosts, tmp_path: Path) -> None:
    """Same names, same sizes; and one file is missing on nodeb."""
    for name in ("one.idx", "one.bin", "two.idx", "two.bin"):
        (tmp_path / name).write_bytes(name.encode() * 1_000_000)
    (tmp_path / "other").write_bytes(b"eno.bin" * 1_000_000)
    (tmp_path / "c.yaml").write_text("cpu: true\ndata-path: [0.3, one, 0.7, two]\n")
    assert doctor(hosts, tmp_path, "--config", "c.yaml").endswith("0\n")
    hosts.b.run("mount", "--bind", str(tmp_path / "other"), str(tmp_path / "one.bin"))
    hosts.b.run("mount", "-t", "tmpfs", "tmpfs", "/opt")
    said = doctor(hosts, tmp_path, "--config", "c.yaml")
    assert "nodeb: the file one.bin of --data-path is not that of nodea (7,000,000 bytes, sha256 " in said
    assert "two" not in said
    assert said.endswith("1\n")
    # The command line wins over the file, and a start refuses.
    assert doctor(hosts, tmp_path, "--config", "c.yaml", "--data-path", "two").endswith("0\n")
    start = Start(hosts, tmp_path, "--save", "s", "--data-path", "one")
    assert start.ends() == 2
    assert "a host that is like the others (the file one.bin of --data-path is not that of nodea" in start.last
    start.clean()
