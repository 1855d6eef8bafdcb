"""One process in plain python: no launcher, nobody to meet, and no port that somebody else may take."""

import os
import socket
import subprocess
import sys

import pytest

ALONE = """
import os, socket
from megatron_patch.upstream.cpu.platform import activate
activate()
import torch
if "MASTER_PORT" in os.environ:  # somebody takes it at the worst moment
    taken = socket.socket()
    taken.bind(("127.0.0.1", int(os.environ["MASTER_PORT"])))
    taken.listen()
torch.distributed.init_process_group("gloo", world_size=1, rank=0, store=None)
group = torch.distributed.new_group([0])
value = torch.ones(2)
torch.distributed.all_reduce(value, group=group)
gathered = [None]
torch.distributed.all_gather_object(gathered, "me")
torch.distributed.barrier()
print(value.tolist(), gathered)
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("port_in_the_shell", [False, True])
def test_one_process_in_plain_python_needs_no_port(port_in_the_shell: bool) -> None:
    """However often others take the port that was free a moment ago, or one that the shell names."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        if port_in_the_shell:
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    words = [sys.executable, "-c", ALONE]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[1.0, 1.0] ['me']\n"
