"""Stands in for a training: `python fake_training.py CONFIG.yaml` writes run.json from a known function of the flags.

The loss is (log2 lr + 6)^2 / 16 + 2. Flags of its own in the config: `until` a file exists it runs, `seconds` it takes
besides, `evaluations` on the way, `diverge-above` and `crash-above` an LR, `crash-unless` a file exists, `stubborn` to
ignore SIGTERM. A file ``starts`` beside run.json has a line for every start: process and environment variable SLOT.
"""

import json
import math
import os
import signal
import sys
import time
from datetime import UTC, datetime
from typing import Any

import yaml


def loss_of(lr: float) -> float:
    """The final loss at a learning rate."""
    return (math.log2(lr) + 6) ** 2 / 16 + 2


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        flags = yaml.safe_load(file)
    folder, lr = flags["metrics-dir"], float(flags["lr"])
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "starts"), "a", encoding="utf-8") as file:
        file.write(f"{os.getpid()} {os.environ.get('SLOT')}\n")
    if flags.get("stubborn"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("training at", lr, flush=True)
    steps = int(flags.get("train-iters", 100))
    content: dict[str, Any] = {
        "status": "running",
        "started": datetime.now(UTC).isoformat(),
        "command": sys.argv,
        "iteration": 0,
        "train_iterations": steps,
        "final_loss": None,
        "best_loss": None,
        "train_loss": None,
        "evaluations": [],
        "layout": {"world": 1},
        "versions": {},
        "arguments": {
            "hidden_size": int(flags["hidden-size"]),
            "lr": lr,
            "weight_decay": float(flags.get("weight-decay", 0.1)),
            "width_scaling": flags.get("width-scaling"),
            "vector_lr": flags.get("vector-lr"),
            "seed": int(flags.get("seed", 1)),
        },
        "updated": datetime.now(UTC).isoformat(),
    }

    def write(**changes: Any) -> None:
        content.update(changes)
        path = os.path.join(folder, "run.json")
        with open(path + ".tmp", "w", encoding="utf-8") as file:
            json.dump(content, file)
        os.replace(path + ".tmp", path)

    write()
    while not os.path.exists(flags.get("until", "/")):
        time.sleep(0.02)
    evaluations = int(flags.get("evaluations", 1))
    for i in range(1, evaluations + 1):
        time.sleep(float(flags.get("seconds", 0)) / evaluations)
        loss = loss_of(lr) + (evaluations - i)
        entry = {"iteration": steps * i // evaluations, "set": "validation", "lm loss": loss}
        write(evaluations=[*content["evaluations"], entry], final_loss=loss, iteration=entry["iteration"])
    if lr > float(flags.get("crash-above", math.inf)) or not os.path.exists(flags.get("crash-unless", "/")):
        print("the machine is on fire")
        print("Killed by the flames", flush=True)
        sys.exit(3)
    if lr > float(flags.get("diverge-above", math.inf)):
        write(status="diverged", train_loss={"lm loss": math.nan})
        sys.exit(16)
    write(status="finished", final_loss=content["final_loss"] if evaluations else None)


if __name__ == "__main__":
    main()
