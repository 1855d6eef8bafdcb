"""A launch that is started on every host by itself: the hosts find the first one through --save, and it leads.

The first host writes an address and a secret into the lock in --save, where only the user can read it. The others wait
for it there, connect, and both sides prove that they know the secret. What is said afterwards is not encrypted. A
connection stays through all restarts, so that all hosts begin each attempt together.
"""

import contextlib
import hmac
import json
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from megatron_patch.errors import ConfigError
from megatron_patch.hosts.save_lock import LOCK, read

GATHER = 1800.0
"""Seconds in which the launch must have been started on all hosts."""
REMIND = 60.0
"""Seconds after which it is said again who is waited for."""
GREETING = 10.0
"""Seconds for each side to prove that it knows the secret."""


def _proof(secret: str, who: str, first: str, second: str) -> str:
    return hmac.new(bytes.fromhex(secret), f"{who} {first} {second}".encode(), "sha256").hexdigest()


class Line:
    """A connection that carries JSON objects, one a line; a host that is lost is noticed after 40 seconds.

    Args:
        connection: whose ends both are ours.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._file = connection.makefile("r", encoding="utf-8", errors="replace")
        self._writing = threading.Lock()
        for option, value in (
            (socket.TCP_KEEPIDLE, 10),
            (socket.TCP_KEEPINTVL, 10),
            (socket.TCP_KEEPCNT, 3),
            (socket.TCP_USER_TIMEOUT, 40_000),
        ):
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def patience(self, seconds: float | None) -> None:
        """Wait no longer than that for the other side; None: for ever."""
        self._socket.settimeout(seconds)

    def send(self, text: str) -> None:
        """Send lines; what cannot be sent is dropped, as the end is told to who reads."""
        with self._writing, contextlib.suppress(OSError):
            self._socket.sendall(text.encode())

    def tell(self, **message: Any) -> None:
        """Send an object."""
        self.send(json.dumps(message) + "\n")

    def hear(self) -> dict[str, Any] | None:
        """Return the next object; None at the end.

        Raises:
            OSError: the connection is broken.
            ValueError: what comes is none.
        """
        text = self._file.readline()
        message = json.loads(text) if text else None
        if message is not None and not isinstance(message, dict):
            raise ValueError("no object")
        return message

    def close(self) -> None:
        """End the connection."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class Peer:
    """Another host, on the first one: a `Link` to the agent of the attempt that is going on.

    Args:
        line: the way to it.
        host: what it calls itself.
    """

    pid: int | None = None

    def __init__(self, line: Line, host: str) -> None:
        self.host = host
        self._line = line
        self._heard: Callable[[str], None] | None = None
        self._ended: Callable[[str], None] | None = None
        self.ready = threading.Event()
        """Whether nothing of an earlier attempt is left there."""
        self.ready.set()
        self.gone: str | None = None
        """Why it is gone; None while it is there."""
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        why = "the connection is closed"
        try:
            while (message := self._line.hear()) is not None:
                if message.get("event") == "ready":
                    self.ready.set()
                elif self._heard:
                    self._heard(json.dumps(message))
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or str(error)
        self.gone = why
        self.ready.set()
        if self._ended:
            self._ended(why)

    def begin(self, job: str) -> None:
        """Have it start an agent for an attempt."""
        self.ready.clear()
        self._line.tell(do="attempt", job=job)

    def tell(self, **message: Any) -> None:
        """Say something to it, rather than to its agent."""
        self._line.tell(**message)

    def listen(self, line: Callable[[str], None], end: Callable[[str], None]) -> None:
        """See `Link`."""
        self._heard, self._ended = line, end
        if self.gone:
            end(self.gone)

    def send(self, text: str) -> None:
        """See `Link`."""
        self._line.send(text)

    def close(self) -> None:
        """See `Link`: the attempt is over, the connection stays."""
        self._heard = self._ended = None
        self._line.tell(do="over")

    def wait(self, patience: float) -> None:
        """See `Link`."""
        self.ready.wait(patience)


class Lobby:
    """Where the other hosts come to.

    Args:
        names: of all hosts, the first one's first.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._peers: dict[int, Peer] = {}
        self._changed = threading.Condition()
        self._secret = secrets.token_hex(32)
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        self._server = socket.create_server(("", 0), family=family, dualstack_ipv6=both, backlog=1024)
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> dict[str, Any]:
        """What the others must know: to be put where only the user can read it."""
        return {"port": self._server.getsockname()[1], "secret": self._secret}

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it is closed
            while True:
                connection, _ = self._server.accept()
                threading.Thread(target=self._receive, args=(connection,), daemon=True).start()

    def _receive(self, connection: socket.socket) -> None:
        line = Line(connection)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if self._admitted(line):
                return
        line.close()

    def _admitted(self, line: Line) -> bool:
        """Let somebody in who knows the secret, and whose place is free."""
        mine = secrets.token_hex(16)
        line.patience(GREETING)
        line.tell(nonce=mine)
        said = line.hear() or {}
        if not hmac.compare_digest(str(said["proof"]), _proof(self._secret, "follows", mine, str(said["nonce"]))):
            return False
        number, host = int(said["node"]), str(said["host"])
        with self._changed:
            there = self._peers.get(number)
            why = ""
            if not 0 < number < len(self._names):
                why = f"a node rank from 1 to {len(self._names) - 1}, which the first host has in its hostfile"
            elif there is not None and not there.gone:
                why = f"a node rank of its own: {there.host} is {number} already"
            if why:
                line.tell(refused=why)
                return False
            line.tell(proof=_proof(self._secret, "leads", str(said["nonce"]), mine))
            line.patience(None)
            self._peers[number] = Peer(line, host)
            self._changed.notify_all()
        return True

    def gather(self, say: Callable[[str], None], patience: float = GATHER) -> dict[str, Peer]:
        """Wait until all hosts are there and ready; return them by name.

        Raises:
            ConfigError: they are not within `patience` seconds.
        """
        began = time.monotonic()
        said = began + 5 - REMIND
        while True:
            with self._changed:
                missing = [
                    number
                    for number in range(1, len(self._names))
                    if (peer := self._peers.get(number)) is None or peer.gone or not peer.ready.is_set()
                ]
                if not missing:
                    return {self._names[number]: self._peers[number] for number in range(1, len(self._names))}
                self._changed.wait(1)
            now = time.monotonic()
            shown = ", ".join(f"{number} ({self._names[number]})" for number in missing[:4])
            shown += f" and {len(missing) - 4} more" if len(missing) > 4 else ""
            if now - began > patience:
                expected = f"a launch on all {len(self._names)} hosts within {patience:.0f} s"
                raise ConfigError("--node-rank", shown, expected, "start the same command there, with its --node-rank")
            if now - said > REMIND:
                said = now
                say(f"waiting for the same command with --node-rank {shown}")

    def tell(self, **message: Any) -> None:
        """Say something to all that are there."""
        with self._changed:
            for peer in self._peers.values():
                if not peer.gone:
                    peer.tell(**message)

    def dismiss(self, code: int, text: str) -> None:
        """Tell all how it ended; they leave with that exit code."""
        self._server.close()
        self.tell(do="done", code=code, text=text)


def join(save: str, address: str, node: int, say: Callable[[str], None]) -> Line:
    """Connect to the first host, on another one.

    Args:
        save: --save, where the lock is in which it says how.
        address: of the first host.
        node: the number of this one.
        say: prints a line.

    Raises:
        ConfigError: it is not there within `GATHER` seconds, or has no place for this host.
    """
    began = time.monotonic()
    said = began + 5 - REMIND
    while True:
        found = read(save)
        why = f"there is no {LOCK} of a launch on several hosts in {save}"
        if "port" in found and "secret" in found:
            try:
                return _introduced(found, address, node)
            except ConfigError:
                raise
            except (OSError, ValueError, KeyError, TypeError) as error:
                why = f"{address} port {found['port']}: {getattr(error, 'strerror', None) or error}"
        now = time.monotonic()
        if now - began > GATHER:
            fix = "start the same command there with --node-rank 0; is --save one place for all hosts?"
            raise ConfigError("--node-rank", node, f"a launch on the first host within {GATHER:.0f} s ({why})", fix)
        if now - said > REMIND:
            said = now
            say(f"waiting for the same command with --node-rank 0 ({why})")
        time.sleep(1)


def _introduced(found: dict[str, Any], address: str, node: int) -> Line:
    line = Line(socket.create_connection((address, int(found["port"])), timeout=GREETING))
    secret, mine = str(found["secret"]), secrets.token_hex(16)
    try:
        theirs = str((line.hear() or {})["nonce"])
        line.tell(nonce=mine, proof=_proof(secret, "follows", theirs, mine), node=node, host=socket.gethostname())
        said = line.hear() or {}
        if "refused" in said:
            raise ConfigError("--node-rank", node, str(said["refused"]), "correct it, or end the other launch")
        if not hmac.compare_digest(str(said["proof"]), _proof(secret, "leads", mine, theirs)):
            raise ValueError("it is not the first host")
    except BaseException:
        line.close()
        raise
    line.patience(None)
    return line
