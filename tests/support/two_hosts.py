"""Two hosts on one machine: namespaces of network, processes, mounts and host name, each with its own sshd.

    with TwoHosts(folder) as hosts:
        hosts.a.run("ssh", "nodeb", "hostname")

The file system is shared, as on a cluster. Everything of a host (addresses, /etc/hosts, the ssh client's settings,
keys, /run) is inside its namespaces, and they end with the process that made them, however it ends: nothing of the
machine is changed, and any number of pairs may live side by side.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

LAUNCH = Path(__file__).parents[2] / "launch"
PATIENCE = 1800
"""Seconds after which a wait fails; a busy machine must not make a test red."""

TINY = """\
cpu: true
mock-data: true
tokenizer-type: NullTokenizer
vocab-size: 63
num-layers: 2
hidden-size: 32
num-attention-heads: 4
seq-length: 32
max-position-embeddings: 32
attention-dropout: 0.0
hidden-dropout: 0.0
no-create-attention-mask-in-dataloader: true
width-scaling: sqrt
base-hidden-size: 16
extra-warmup: decay-away
alignment-interval: 2
alignment-tokens: 32
spectral-interval: 2
micro-batch-size: 2
global-batch-size: 4
train-iters: 6
lr: 1.0e-2
lr-warmup-iters: 2
lr-decay-iters: 6
weight-decay: 0.1
num-workers: 0
eval-interval: 1000
eval-iters: 1
save-interval: 3
log-interval: 1
"""
"""A config: training that takes as little as it can, with everything of ours in it."""

SSHD_CONFIG = """\
ListenAddress {address}
HostKey {folder}/{name}.key
AuthorizedKeysFile {folder}/user.key.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
MaxStartups 100
"""
SSH_CONFIG = """\
Host *
    IdentityFile {folder}/user.key
    IdentitiesOnly yes
    GlobalKnownHostsFile {folder}/known_hosts
    UserKnownHostsFile /dev/null
    StrictHostKeyChecking yes
"""
# The first process of a host. `read` ends when whoever holds the other end of its input has ended, and with it every
# process of the host; bash reaps what others leave behind.
INIT = """\
set -e
mount --make-rprivate /
mount -t proc proc /proc
mount --bind {folder}/etc_hosts /etc/hosts
mount --bind {folder}/ssh_config /etc/ssh/ssh_config
mount -t tmpfs tmpfs /run
mkdir /run/sshd
hostname {name}
ip link set lo up
until ip link show eth0 > /dev/null 2>&1; do sleep 0.05; done
ip addr add {address}/24 dev eth0
ip link set eth0 up
{sshd} -f {folder}/{name}.sshd -E {folder}/{name}.sshd.log
read -r _
"""


def missing() -> str | None:
    """Why hosts cannot be made here; None if they can."""
    if os.geteuid() != 0:
        return "two hosts need root, for namespaces and sshd"
    for command, package in {
        "ip": "iproute2",
        "sshd": "openssh-server",
        "ssh": "openssh-client",
        "pdsh": "pdsh",
    }.items():
        if _which(command) is None:
            return f"two hosts need {command} (apt-get install {package})"
    tried = subprocess.run(["unshare", "-n", "-m", "-p", "-u", "-f", "true"], capture_output=True, text=True)
    return f"two hosts need namespaces: {tried.stderr.strip()}" if tried.returncode else None


def _which(command: str) -> str | None:
    return shutil.which(command, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class Host:
    """One of them.

    Args:
        name: its host name.
        address: its IPv4 address.
        folder: with keys and settings, of the pair.
    """

    def __init__(self, name: str, address: str, folder: Path) -> None:
        self.name, self.address, self._folder = name, address, folder
        (folder / f"{name}.sshd").write_text(SSHD_CONFIG.format(address=address, name=name, folder=folder))
        init = INIT.format(folder=folder, name=name, address=address, sshd=_which("sshd"))
        # The namespaces end with unshare, and unshare ends with us.
        self._holder = subprocess.Popen(
            [*"setpriv --pdeathsig KILL unshare --net --mount --pid --uts --fork --kill-child bash -c".split(), init],
            stdin=subprocess.PIPE,
            stdout=(folder / f"{name}.log").open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        children = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children")
        wait_for(lambda: self._holder.poll() is not None or bool(children.read_text().split()), f"the init of {name}")
        assert self._holder.poll() is None, self.log()
        self.pid = int(children.read_text().split()[0])
        """Of its first process, as this machine counts."""

    def log(self) -> str:
        """What its start printed."""
        logs = [self._folder / f"{self.name}.log", self._folder / f"{self.name}.sshd.log"]
        return "\n".join(path.read_text() for path in logs if path.exists())

    def command(self, *words: str, cwd: Path | None = None) -> list[str]:
        """The command line, for this machine, that runs `words` on the host."""
        inside = ["sh", "-c", 'cd "$1" && shift && exec "$@"', "sh", str(cwd or self._folder), *words]
        return ["nsenter", "-t", str(self.pid), "-n", "-m", "-p", "-u", *inside]

    def popen(self, *words: str, cwd: Path | None = None, **more: Any) -> subprocess.Popen[str]:
        """Start a command on the host."""
        return subprocess.Popen(self.command(*words, cwd=cwd), text=True, **more)

    def run(self, *words: str, cwd: Path | None = None, check: bool = True, **more: Any) -> str:
        """Run a command on the host and return what it printed."""
        command = self.command(*words, cwd=cwd)
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, **more)
        assert done.returncode == 0 or not check, f"{words} on {self.name}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def processes(self) -> Iterator[tuple[int, str, dict[str, str]]]:
        """Every process of the host that is no zombie: PID as this machine counts, command line, environment."""
        ours = os.stat(f"/proc/{self.pid}/ns/pid").st_ino
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                if os.stat(entry / "ns/pid").st_ino != ours:
                    continue
                words = (entry / "cmdline").read_bytes().split(b"\0")
                pairs = (pair.partition(b"=") for pair in (entry / "environ").read_bytes().split(b"\0"))
                environment = {name.decode(): value.decode(errors="replace") for name, _, value in pairs}
                if (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    yield int(entry.name), b" ".join(words).decode(errors="replace"), environment

    def close(self) -> None:
        """End it with all its processes."""
        self._holder.kill()
        self._holder.wait()
        assert self._holder.stdin is not None
        self._holder.stdin.close()


class TwoHosts:
    """nodea and nodeb, 10.77.0.1 and 10.77.0.2.

    Args:
        folder: for keys, settings and logs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        addresses = {"nodea": "10.77.0.1", "nodeb": "10.77.0.2"}
        for name in ("user", *addresses):
            key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(folder / f"{name}.key")]
            subprocess.run(key, check=True)
        known = [f"{n},{a} {(folder / f'{n}.key.pub').read_text()}" for n, a in addresses.items()]
        (folder / "known_hosts").write_text("".join(known))
        names = "".join(f"{address} {name}\n" for name, address in addresses.items())
        (folder / "etc_hosts").write_text(f"127.0.0.1 localhost\n{names}")
        (folder / "ssh_config").write_text(SSH_CONFIG.format(folder=folder))
        self.hostfile = folder / "hosts"
        self.hostfile.write_text("".join(f"{name} slots=1\n" for name in addresses))
        self.a, self.b = self.both = [Host(name, address, folder) for name, address in addresses.items()]
        # From inside of nodea's network: nothing is made in this machine's own.
        cable = f"link add eth0 type veth peer name eth0 netns {self.b.pid}"
        subprocess.run(["nsenter", "-t", str(self.a.pid), "-n", "ip", *cable.split()], check=True)
        for host in self.both:
            # sshd's command returns before it listens
            wait_for(lambda host=host: "Server listening on" in host.log(), f"sshd of {host.name}", host.log)

    def __enter__(self) -> "TwoHosts":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End both."""
        for host in self.both:
            host.close()

    def cut(self) -> None:
        """Pull the cable."""
        self.b.run("ip", "link", "set", "eth0", "down")

    def join(self) -> None:
        """Plug it in again."""
        self.b.run("ip", "link", "set", "eth0", "up")


def environment(**more: str) -> Mapping[str, str]:
    """A small environment for commands on a host, with the Python that runs the tests first on PATH."""
    path = f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    root = str(Path(__file__).parents[2])
    return {"PATH": path, "HOME": "/root", "LANG": "C.UTF-8", "PYTHONPATH": root, "OMP_NUM_THREADS": "1", **more}


def wait_for(condition: Any, what: str, why: Any = lambda: "", patience: float = PATIENCE) -> None:
    """Wait until `condition()` is true; fail with `why()` after `patience` seconds."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, f"waited {patience} s for {what}: {why()}"
        time.sleep(0.05)
