"""Ranks that are about to train different things stop before the first step; each case with two real ranks.

Both ranks are of one machine. What makes them two hosts is a name for each, and that each reads its own files.
"""

import os
import re
import socket
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_patch.errors import ConfigError
from megatron_patch.files.run_json import JOB
from megatron_patch.hosts import same as facts
from megatron_patch.hosts.same import SAMPLE_BYTES, SAMPLES, sampled
from megatron_patch.upstream import agreement
from megatron_patch.upstream.agreement import check_agreement
from tests.support.pool import Pool, RankFailure
from tests.support.training import MOE, TINY, Patched, train

HASH = r"sha256 \w{12}"


def _as_hosts(difference: Callable[[Namespace, int, Path], None], allow: bool, folder: Path, slots: int) -> str:
    """In a worker: what the check says where `difference` has been done to the arguments or the process of a host."""
    import torch

    rank, local_rank = divmod(torch.distributed.get_rank(), slots)
    os.environ["LOCAL_RANK"] = str(local_rank)
    socket.gethostname = lambda: f"node{rank}"
    agreement.SEEN_SECONDS = 1.0
    own = folder / f"node{rank}"
    own.mkdir(exist_ok=True)
    (own / "corpus.bin").write_bytes(bytes(1000))
    (own / "corpus.idx").write_bytes(b"index")
    (own / "tokenizer.model").write_bytes(b"pieces")
    args = Namespace(
        rank=torch.distributed.get_rank(),
        local_rank=local_rank,
        lr=0.01,
        seed=1,
        data_path=["0.5", str(own / "corpus")],
        tokenizer_model=str(own / "tokenizer.model"),
        data_cache_path=str(own / "cache"),
        save=str(folder / "save"),
        timers=object(),
    )
    difference(args, rank, own)
    said: list[str] = []
    try:
        check_agreement(args, allow, said.append)
    except ConfigError as error:
        return str(error)
    return "\n".join(said)


def nothing(args: Namespace, rank: int, own: Path) -> None:
    """Two hosts that agree, with paths of their own, each with a launch of its own as --no-ssh and Slurm have."""
    os.environ[JOB] = f"job-of-node{rank}"


def data(args: Namespace, rank: int, own: Path) -> None:
    (own / "corpus.bin").write_bytes(bytes(999) + bytes([rank]))


def tokenizer(args: Namespace, rank: int, own: Path) -> None:
    (own / "tokenizer.model").write_bytes(b"pieces" * (rank + 1))


def unreadable(args: Namespace, rank: int, own: Path) -> None:
    if rank:
        real = os.path.getsize

        def getsize(path: Any) -> int:
            if str(path).endswith("corpus.idx"):
                raise PermissionError(13, "Permission denied")
            return real(path)

        os.path.getsize = getsize  # type: ignore[assignment]


def arguments(args: Namespace, rank: int, own: Path) -> None:
    args.lr, args.seed = (0.01, 1) if rank == 0 else (0.02, 7)
    args.only_here = True


def script(args: Namespace, rank: int, own: Path) -> None:
    (own / "pretrain.py").write_text(f"LOSS_SCALE = {1 + rank / 2}")
    (own / "helper.py").write_text(f"VALUE = {rank}")
    sys.modules["__main__"].__file__ = str(own / "pretrain.py")
    helper = ModuleType("helper")
    helper.__file__ = str(own / "helper.py")
    sys.modules["helper"] = helper


def package(args: Namespace, rank: int, own: Path) -> None:
    (own / "metrics.py").write_text(f"FACTOR = {rank}")
    real = facts.importlib.util.find_spec

    def find_spec(name: str) -> Any:
        spec = real(name)
        if name == "megatron_patch" and spec is not None:
            spec.submodule_search_locations = [str(own)]
        return spec

    facts.importlib.util.find_spec = find_spec  # type: ignore[assignment]


def version(args: Namespace, rank: int, own: Path) -> None:
    real = facts.importlib.metadata.version
    facts.importlib.metadata.version = lambda name: f"2.{14 + rank}" if name == "torch" else real(name)


def variable(args: Namespace, rank: int, own: Path) -> None:
    os.environ.pop("NVTE_FLASH_ATTN", None)
    if rank:
        os.environ["NVTE_FLASH_ATTN"] = "0"


def save(args: Namespace, rank: int, own: Path) -> None:
    if rank:
        os.path.exists = lambda path: False  # of all paths, only what rank 0 has written is asked for


def no_room(args: Namespace, rank: int, own: Path) -> None:
    (own / "file").touch()
    args.save = str(own.parent / "node0" / "file" / "save")


def missing(args: Namespace, rank: int, own: Path) -> None:
    if rank:
        (own / "corpus.bin").unlink(missing_ok=True)


def check(pool: Pool, folder: Path, difference: Callable[..., None], allow: bool = False, slots: int = 1) -> str:
    """What all ranks of two hosts say, which is one thing."""
    ranks = 2 * slots
    said = pool.run(_as_hosts, ranks=ranks, difference=difference, allow=allow, folder=folder, slots=slots)
    assert len(said) == ranks and len(set(said)) == 1
    return said[0]


def test_hosts_that_agree_go_on(pool: Pool, tmp_path: Path) -> None:
    assert check(pool, tmp_path, nothing, slots=2) == ""
    assert os.listdir(tmp_path / "save") == []


def test_files_are_compared_between_hosts(pool: Pool, tmp_path: Path) -> None:
    """One rank of each host reads them; the arguments of all ranks are compared."""
    said = check(pool, tmp_path, missing, slots=2)
    there = rf"1,000 bytes, {HASH} on rank 0 \(node0\)"
    lost = r"unreadable \(No such file or directory\) on rank 2 \(node1\)"
    assert re.match(rf"the ranks differ in the file corpus\.bin of --data-path \({there}, {lost}\): ", said), said
    assert "--lr (0.01 on ranks 0, 1 (node0), 0.02 on ranks 2, 3 (node1))" in check(pool, tmp_path, arguments, slots=2)


TWO = r"\(%s on rank 0 \(node0\), %s on rank 1 \(node1\)\)"


@pytest.mark.parametrize(
    ("difference", "expected"),
    [
        (data, r"the file corpus\.bin of --data-path " + TWO % (rf"1,000 bytes, {HASH}", rf"1,000 bytes, {HASH}")),
        (tokenizer, r"the file of --tokenizer-model " + TWO % (rf"6 bytes, {HASH}", rf"12 bytes, {HASH}")),
        (
            unreadable,
            r"the file corpus\.idx of --data-path " + TWO % (rf"5 bytes, {HASH}", r"unreadable \(Permission denied\)"),
        ),
        (arguments, rf"--lr {TWO % ('0.01', '0.02')}; --seed {TWO % (1, 7)}"),
        (script, rf"the script pretrain\.py {TWO % (HASH, HASH)}; the module helper {TWO % (HASH, HASH)}"),
        (package, rf"the source of megatron_patch {TWO % (HASH, HASH)}"),
        (version, rf"torch {TWO % ('2.14', '2.15')}"),
        (variable, rf"the variable NVTE_FLASH_ATTN {TWO % ('not set', 0)}"),
        (save, r"--save \(.*/save, where rank 1 \(node1\) cannot see what rank 0 \(node0\) writes\)"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_difference_stops_every_rank(
    pool: Pool, tmp_path: Path, difference: Callable[..., None], expected: str
) -> None:
    said = check(pool, tmp_path, difference)
    end = ": expected none; repair what differs, or add --allow-rank-differences"
    assert re.fullmatch(f"the ranks differ in {expected}{end}", said), said


def test_a_folder_that_nobody_can_write_to_stops_every_rank(pool: Pool, tmp_path: Path) -> None:
    said = check(pool, tmp_path, no_room)
    assert re.match(r"--save .*/node0/file/save: expected a folder that can be written to \(Not a directory\); ", said)


def test_a_difference_may_be_allowed(pool: Pool, tmp_path: Path) -> None:
    said = check(pool, tmp_path, arguments, allow=True).splitlines()
    assert said == [
        "WARNING: the ranks differ in --lr: 0.01 on rank 0 (node0), 0.02 on rank 1 (node1)",
        "WARNING: the ranks differ in --seed: 1 on rank 0 (node0), 7 on rank 1 (node1)",
    ]


def test_a_large_file_is_sampled_from_end_to_end(tmp_path: Path) -> None:
    """The first and the last byte count, and so does the size; a whole read of a corpus would take hours."""
    size = 4 * SAMPLES * SAMPLE_BYTES
    path = tmp_path / "corpus.bin"
    content = bytearray(size)
    found = set()
    for place in (None, 0, size - 1, size - SAMPLE_BYTES):
        changed = bytes(content) if place is None else bytes(content[:place] + b"x" + content[place + 1 :])
        path.write_bytes(changed)
        found.add(sampled(str(path)))
    path.write_bytes(content + b"\0")
    found.add(sampled(str(path)))
    assert len(found) == 5


RULE = ("--width-scaling", "sqrt", "--base-hidden-size", "16")
INTERLEAVED = "--num-layers 4 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"
LAYOUTS = {
    "pipeline": tuple(INTERLEAVED.split()),
    "tensor": ("--tensor-model-parallel-size", "2", "--sequence-parallel"),
    "data": ("--use-distributed-optimizer",),
    "experts": (*MOE, "--expert-model-parallel-size", "2"),
}


class Seeded(Patched):
    """One rank has another seed, as from another YAML file."""

    def before_arguments(self) -> None:
        super().before_arguments()
        from megatron.training import training

        original = training.setup_model_and_optimizer

        def other(*args: Any, **named: Any) -> Any:
            import torch
            from megatron.training import get_args

            get_args().seed += torch.distributed.get_rank()
            return original(*args, **named)

        training.setup_model_and_optimizer = other


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_ranks_of_a_real_run_agree(pool: Pool, layout: tuple[str, ...], tmp_path: Path) -> None:
    """No argument of Megatron's own differs over ranks but those that the check knows of."""
    argv = [*TINY, *RULE, *layout, "--save", str(tmp_path), "--save-interval", "100"]
    first, second = pool.run(train, ranks=2, argv=argv, steps=1, hooks=Patched())
    assert len(first.losses) == 1 and first.losses == second.losses


def test_a_real_run_stops_before_its_first_step(pool: Pool) -> None:
    with pytest.raises(RankFailure) as caught:
        pool.run(train, ranks=2, argv=[*TINY, *RULE], steps=1, hooks=Seeded())
    assert sorted(caught.value.errors) == [0, 1]
    host = socket.gethostname()
    for text in caught.value.errors.values():
        assert f"the ranks differ in --seed (1234 on rank 0 ({host}), 1235 on rank 1 ({host})): expected none" in text
