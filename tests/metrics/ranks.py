"""Runs a function on several gloo ranks in processes of their own: no Megatron, so starting them is cheap."""

import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _main(rank: int, world: int, port: int, function: Callable[..., Any], args: tuple[Any, ...], out: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    out[rank] = function(rank, *args)
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Return what `function(rank, *args)` returns on each of `world` ranks; it must be importable and picklable."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with mp.Manager() as manager:
        out = manager.dict()
        mp.spawn(_main, args=(world, port, function, args, out), nprocs=world)
        return [out[rank] for rank in range(world)]
