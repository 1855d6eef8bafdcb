"""Hosts that find each other through the lock in --save: who is let in, who is waited for, what is said to them."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_patch.entry.asked import Asked
from megatron_patch.errors import ConfigError
from megatron_patch.hosts import several
from megatron_patch.hosts.links import Link
from megatron_patch.hosts.remote import Hosts
from megatron_patch.hosts.save_lock import LOCK, Lock
from megatron_patch.hosts.several import Line, Lobby, Peer, join
from tests.support.two_hosts import wait_for

NAMES = ("a", "b", "c")


@pytest.fixture
def lobby() -> Iterator[Lobby]:
    made = Lobby(NAMES)
    yield made
    made.dismiss(0, "")


@pytest.fixture
def save(tmp_path: Path, lobby: Lobby) -> str:
    """A folder with the lock of a launch that waits for others."""
    assert Lock(str(tmp_path), {"job": "one", **lobby.address}).take()["held"]
    return str(tmp_path)


def quiet(text: str) -> None:
    """Where what is said does not matter."""


def enter(save: str, node: int) -> Line:
    return join(save, "127.0.0.1", node, quiet)


def test_a_peer_is_a_link(lobby: Lobby, save: str) -> None:
    line, other = enter(save, 1), enter(save, 2)
    peer: Link = lobby.gather(quiet)["b"]
    assert peer.pid is None
    hosts = Hosts([], local=True)
    hosts.add("b", peer)
    asked = hosts.remotes["b"].ask("facts", x=1)
    assert line.hear() == {"id": 1, "do": "facts", "x": 1}
    line.tell(id=1, answer={"y": 2})
    assert asked.result(1800) == {"y": 2}
    line.tell(event="noticed", z=3)
    assert hosts.events.get(timeout=1800).particulars == {"z": 3}
    line.close()
    assert hosts.events.get(timeout=1800).name == "lost"
    hosts.close()
    other.close()


def test_the_secret_is_private(save: str) -> None:
    assert Path(save, LOCK).stat().st_mode & 0o777 == 0o600


def test_a_dead_job_s_lock_becomes_private(tmp_path: Path, lobby: Lobby) -> None:
    (tmp_path / LOCK).write_text("{}")
    (tmp_path / LOCK).chmod(0o644)
    assert Lock(str(tmp_path), {"job": "two", **lobby.address}).take(over="{}")["held"]
    assert (tmp_path / LOCK).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(("node", "why"), [(3, "a node rank from 1 to 2"), (0, "a node rank from 1 to 2")])
def test_a_node_rank_that_is_none(save: str, node: int, why: str) -> None:
    with pytest.raises(ConfigError, match=f"--node-rank {node}: expected {why}"):
        enter(save, node)


def test_a_node_rank_that_is_taken(save: str) -> None:
    first = enter(save, 1)
    with pytest.raises(ConfigError, match=rf"a node rank of its own: {socket.gethostname()} is 1 already"):
        enter(save, 1)
    first.close()
    back = []
    wait_for(lambda: back or back.append(again(save)) or back[0], "a place that is free again")


def again(save: str) -> bool:
    try:
        return bool(enter(save, 1))
    except ConfigError:
        time.sleep(0.1)
        return False


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"[]\n",
        b'{"nonce": "x"}\n',
        b'{"nonce": "x", "proof": 7, "node": 1, "host": "h"}\n',
        b'{"nonce": "x", "proof": "' + b"0" * 64 + b'", "node": 1, "host": "h"}\n',
    ],
)
def test_who_does_not_know_the_secret_is_not_let_in(lobby: Lobby, said: bytes) -> None:
    with socket.create_connection(("127.0.0.1", lobby.address["port"])) as stranger:
        file = stranger.makefile("rb")
        assert "nonce" in json.loads(file.readline())
        stranger.sendall(said)
        stranger.shutdown(socket.SHUT_WR)
        assert file.read() == b""
    with pytest.raises(ConfigError, match=r"--node-rank 1 \(b\), 2 \(c\): expected a launch on all 3 hosts"):
        lobby.gather(quiet, patience=0)


def test_a_silent_stranger_keeps_nobody_waiting(lobby: Lobby, save: str) -> None:
    with socket.create_connection(("127.0.0.1", lobby.address["port"])):
        lines = [enter(save, node) for node in (1, 2)]
        assert set(lobby.gather(quiet)) == {"b", "c"}
    del lines


def test_a_first_host_that_does_not_know_the_secret_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where somebody else's program listens at a dead launch's port."""
    monkeypatch.setattr(several, "GATHER", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def pretend() -> None:
            with contextlib.suppress(OSError):  # it is closed
                while True:
                    line = Line(server.accept()[0])
                    line.tell(nonce="0" * 32)
                    line.hear()
                    line.tell(proof="0" * 64)

        threading.Thread(target=pretend, daemon=True).start()
        record = {"job": "one", "port": server.getsockname()[1], "secret": "ab" * 32}
        (tmp_path / LOCK).write_text(json.dumps(record))
        with pytest.raises(ConfigError, match=r"it is not the first host"):
            enter(str(tmp_path), 1)


def test_who_is_waited_for(lobby: Lobby, save: str, monkeypatch: pytest.MonkeyPatch) -> None:
    line = enter(save, 1)
    said: list[str] = []
    with pytest.raises(ConfigError, match=r"--node-rank 2 \(c\): expected a launch on all 3 hosts within 6 s"):
        lobby.gather(said.append, patience=6)
    assert said == ["waiting for the same command with --node-rank 2 (c)"]
    monkeypatch.setattr(several, "GATHER", 6.0)
    said.clear()
    with pytest.raises(ConfigError, match=r"--node-rank 1: expected a launch on the first host within 6 s"):
        join("/nowhere", "127.0.0.1", 1, said.append)
    assert len(said) == 1 and said[0].startswith("waiting for the same command with --node-rank 0 (there is no launch")
    del line


def test_an_attempt_begins_when_nothing_is_left_of_the_one_before(lobby: Lobby, save: str) -> None:
    lines = [enter(save, node) for node in (1, 2)]
    peers = lobby.gather(quiet)
    for peer in peers.values():
        peer.begin("job1")
    assert [line.hear() for line in lines] == [{"do": "attempt", "job": "job1"}] * 2
    for peer in peers.values():
        peer.close()
    lines[0].tell(event="ready")
    with pytest.raises(ConfigError, match=r"--node-rank 2 \(c\)"):
        lobby.gather(quiet, patience=2)
    lines[1].tell(event="ready")
    assert isinstance(lobby.gather(quiet)["c"], Peer)
    lobby.dismiss(7, "so it ended")
    heard: list[Any] = [line.hear() for line in lines], [line.hear() for line in lines]
    assert heard == ([{"do": "over"}] * 2, [{"do": "done", "code": 7, "text": "so it ended"}] * 2)


class TestWhatIsKnownBeforehand:
    @pytest.mark.parametrize(
        ("yaml", "flags", "data"),
        [
            ("lr: 1", [], {}),
            ("data-path: d", [], {"data_path": ["d"]}),
            ("data-path: [0.3, d, 0.7, e]", [], {"data_path": ["0.3", "d", "0.7", "e"]}),
            ("data-path: d", ["--data-path", "x", "y", "--lr", "1"], {"data_path": ["x", "y"]}),
            ("tokenizer-model: t", ["--valid-data-path", "v"], {"valid_data_path": ["v"], "tokenizer_model": "t"}),
        ],
    )
    def test_data(self, tmp_path: Path, yaml: str, flags: list[str], data: dict[str, Any]) -> None:
        (tmp_path / "c.yaml").write_text(yaml)
        assert Asked.of(["--config", str(tmp_path / "c.yaml"), *flags]).data == data

    @pytest.mark.parametrize(("text", "slots"), [("cpu: true", None), ("lr: 1", {"a": 8})])
    def test_gpus(self, tmp_path: Path, text: str, slots: dict[str, int] | None) -> None:
        (tmp_path / "c.yaml").write_text(text)
        assert Asked.of(["--config", str(tmp_path / "c.yaml")]).wanted(29500, {"a": 8}).slots == slots

    def test_how_long_ranks_may_wait(self, tmp_path: Path) -> None:
        (tmp_path / "c.yaml").write_text("distributed-timeout-minutes: 60")
        assert Asked.of(["--config", str(tmp_path / "c.yaml")]).wait == 3600
