"""A Megatron script whose ranks hang, or take their time, where a file in the working directory says so.

It is launch/pretrain.py with something in the place of `get_batch` and `save_checkpoint`'s tracker file. The file
``trouble.json``: ``how`` (``loop``, ``sleep``, ``collective``, or ``slow``, which ends), ``where`` (``import``,
``start``, ``batch``, ``evaluation``, ``save``), ``rank``, ``iteration``, ``seconds`` of what is slow, and ``once`` if
only the first start is meant.
"""

from pathlib import Path

from tests.support.two_hosts import LAUNCH

_SCRIPT = '''
"""Trains, and hangs where trouble.json says so."""
import importlib.util, json, os, sys, time
from pathlib import Path
import torch

MINE = int(os.environ["RANK"])
TROUBLE = json.loads(Path("trouble.json").read_text())
FIRST = not Path("restarted").exists()


def spin():
    while True: pass


def trouble(where, iteration):
    if TROUBLE["where"] != where or TROUBLE.get("rank", 1) != MINE or TROUBLE.get("iteration", 5) != iteration:
        return
    if TROUBLE.get("once"):
        if not FIRST:
            return
        Path("restarted").touch()
    print(f"rank {MINE}: {TROUBLE['how']} in {where}", flush=True)
    if TROUBLE["how"] == "slow":
        time.sleep(TROUBLE["seconds"])
    elif TROUBLE["how"] == "loop":
        spin()
    elif TROUBLE["how"] == "sleep":
        time.sleep(10**6)
    else:  # alone in a collective that nobody else is in
        torch.distributed.all_reduce(torch.ones(1, device="cpu"))


trouble("import", 5)
spec = importlib.util.spec_from_file_location("gpt", SCRIPT_PATH)
gpt = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpt)
from megatron.training import checkpointing, get_args

batch, provide, tracker = gpt.get_batch, gpt.datasets_provider, checkpointing.get_checkpoint_tracker_filename


def get_batch(iterator, stage):
    training = torch.is_grad_enabled()
    trouble("batch" if training else "evaluation", getattr(get_args(), "curr_iteration", 0) + 1)
    return batch(iterator, stage)


def datasets_provider(*args, **kwargs):
    trouble("start", 5)
    return provide(*args, **kwargs)


datasets_provider.is_distributed = True


def get_checkpoint_tracker_filename(path):
    trouble("save", getattr(get_args(), "curr_iteration", 0) + 1)
    return tracker(path)


gpt.get_batch, gpt.datasets_provider = get_batch, datasets_provider
checkpointing.get_checkpoint_tracker_filename = get_checkpoint_tracker_filename
if __name__ == "__main__":  # Megatron's checkpoint writer has helpers that import this file
    gpt.main()
'''


def write_script(folder: Path) -> str:
    """Write it into a folder, and return its name."""
    (folder / "sticks.py").write_text(_SCRIPT.replace("SCRIPT_PATH", repr(str(LAUNCH / "pretrain.py"))))
    return "sticks.py"
