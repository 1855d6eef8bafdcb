"""megatron-patch doctor, asked of two hosts."""

import sys
from pathlib import Path

from tests.support.faulty_hosts import ENDLESS, Start
from tests.support.two_hosts import TwoHosts, environment


def doctor(hosts: TwoHosts, folder: Path, *more: str) -> str:
    """What it prints, and its exit code as the last word."""
    command = [sys.executable, "-m", "megatron_patch", "doctor", "--hostfile", str(hosts.hostfile), *more]
    return hosts.a.run("sh", "-c", '"$@"; echo $?', "sh", *command, cwd=folder, env=environment(), check=False)


def test_healthy_hosts(hosts: TwoHosts, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "c.yaml").touch()
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
    assert "nodea: nothing found" in said
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
