"""The hosts of the tests themselves: apart from each other, and gone with whoever made them, however that ended."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.two_hosts import TwoHosts, environment, wait_for

KEEPER = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts the tests with & ignores it for all
from pathlib import Path
from tests.support.two_hosts import TwoHosts
with TwoHosts(Path(sys.argv[1])) as hosts:
    pids = [str(host.popen("sleep", "100000").pid) for host in hosts.both]
    Path(sys.argv[1], "pids").write_text(" ".join(pids) + "\\n")
    sys.stdin.read()
"""


def named(text: str) -> list[str]:
    """The command lines of all processes in which a text is: a host's first ones name its folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_bytes().decode(errors="replace"))
    return [line for line in found if text in line]


def test_they_have_names_addresses_processes_and_mounts_of_their_own(hosts: TwoHosts, tmp_path: Path) -> None:
    for host, other in (hosts.both, hosts.both[::-1]):
        assert host.run("ssh", other.name, "hostname; hostname -I").split() == [other.name, other.address]
    (tmp_path / "shared").mkdir()
    hosts.a.run("mount", "-t", "tmpfs", "tmpfs", str(tmp_path / "shared"))
    hosts.a.run("touch", str(tmp_path / "shared/seen"))
    assert not (tmp_path / "shared/seen").exists()
    assert "shared" not in hosts.b.run("cat", "/proc/mounts")
    assert len(list(hosts.b.processes())) < 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_of_them(possible: None, tmp_path: Path, number: int) -> None:
    mounts = Path("/proc/mounts").read_text()
    keeper = subprocess.Popen(
        [sys.executable, "-c", KEEPER, str(tmp_path)], stdin=subprocess.PIPE, env=dict(environment()), cwd=tmp_path
    )
    wait_for(lambda: (tmp_path / "pids").exists() and (tmp_path / "pids").read_text().endswith("\n"), "the hosts")
    pids = (tmp_path / "pids").read_text().split()
    assert named(str(tmp_path))
    os.kill(keeper.pid, number)
    keeper.wait()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "the end of their processes")
    wait_for(lambda: not named(str(tmp_path)), "the end of the hosts", lambda: named(str(tmp_path)))
    assert str(tmp_path) not in Path("/proc/mounts").read_text().replace(mounts, "")
