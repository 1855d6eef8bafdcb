"""The pool of worker processes itself: values by rank, failures that name their rank, hangs that end, no leaks."""

import os
import time

import pytest

from tests.support.pool import HANGS, Pool, RankFailure


def _sum_of_ranks(value: int) -> int:
    import torch

    total = torch.tensor(value + torch.distributed.get_rank())
    torch.distributed.all_reduce(total)
    return int(total)


def _fail_on(rank: int) -> None:
    import torch

    print(f"rank {torch.distributed.get_rank()} was here")
    if torch.distributed.get_rank() == rank:
        raise ValueError("something is wrong")
    torch.distributed.barrier()  # never completes: the failing rank does not come


def _hang() -> None:
    time.sleep(HANGS)  # far longer than the job's timeout


def _die() -> None:
    os._exit(7)


def _leave_a_mark() -> bool:
    import torch

    marked = hasattr(torch, "mark")
    torch.mark = True  # type: ignore[attr-defined]
    return marked


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_values_come_back_by_rank(pool: Pool, ranks: int) -> None:
    assert pool.run(_sum_of_ranks, ranks=ranks, value=3) == [3 * ranks + ranks * (ranks - 1) // 2] * ranks


def test_a_failing_rank_is_named_with_its_traceback_and_its_output(pool: Pool) -> None:
    with pytest.raises(RankFailure, match="rank 1 of 2 failed") as caught:
        pool.run(_fail_on, ranks=2, rank=1)
    assert "ValueError: something is wrong" in str(caught.value)
    assert "rank 1 was here" in str(caught.value)
    assert next(iter(caught.value.errors)) == 1


def test_a_hanging_job_is_killed_and_shows_where_it_hung(pool: Pool) -> None:
    for timeout in (1.0, 10.0, 100.0):  # on a busy machine a rank may not get as far as `_hang` within a second
        with pytest.raises(RankFailure, match=rf"not done after {timeout:g} s") as caught:
            pool.run(_hang, timeout=timeout, distributed=False)
        if "in _hang" in str(caught.value):
            break
    assert "in _hang" in str(caught.value)


def test_a_rank_that_dies_is_reported(pool: Pool) -> None:
    with pytest.raises(RankFailure, match=r"died without a Python exception \(exit code 7\)"):
        pool.run(_die, distributed=False)


def test_nothing_a_job_changes_reaches_the_next(pool: Pool) -> None:
    assert [pool.run(_leave_a_mark, distributed=False) for _ in range(2)] == [[False], [False]]
