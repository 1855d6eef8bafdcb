"""Folders as training runs leave them, written with the project's and TensorBoard's own writers."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from megatron_patch.files.json_lines import JsonLines
from megatron_patch.metrics.derive import KEYS

LAYERS = {  # kind in pictures -> layer and fan-in
    "q": ("self_attention.linear_qkv/q", 64),
    "proj": ("self_attention.linear_proj", 64),
    "gate": ("mlp.linear_fc1/gate", 64),
    "fc2": ("mlp.linear_fc2", 128),
}
CLASSES = {"embedding": (0.01, 0.1), "matrix": (0.005, 0.2), "vector": (0.01, 0.0)}
STEPS = 40


def lr_factor(iteration: int, steps: int = STEPS) -> float:
    """A schedule that falls to 0 at the last step."""
    return 1 - iteration / steps


def train_loss(iteration: int) -> float:
    """A loss with a spike at iteration 7."""
    return 2.0 + 3.0 / iteration + (1.0 if iteration == 7 else 0.0)


def write_run(parent: Path, tensorboard: bool = True, alignment: bool = True, **arguments: Any) -> Path:
    """Write a finished run of `STEPS` iterations to ``transfer/`` and ``tensorboard/`` in `parent`; return `parent`."""
    folder = parent / "transfer"
    folder.mkdir(parents=True)
    write_record(folder, tensorboard_dir=f"{parent}/tensorboard", save=f"{parent}", **arguments)
    write_hyperparameters(folder)
    if tensorboard:
        write_events(parent / "tensorboard", range(1, STEPS + 1))
    if alignment:
        write_metrics(folder, range(2, STEPS + 1, 2))
    return parent


def write_record(folder: Path, content: Mapping[str, Any] | None = None, **arguments: Any) -> None:
    """Write run.json; `content` replaces top-level entries, `arguments` Megatron's arguments."""
    evaluations = [
        {"iteration": 10, "set": "validation", "lm loss": 2.4375},
        {"iteration": 20, "set": "validation", "lm loss": 2.1625},
        {"iteration": 40, "set": "validation", "lm loss": 2.1875},
        {"iteration": 40, "set": "test", "lm loss": 2.203125},
    ]
    record = {
        "status": "finished",
        "started": "2026-01-01T10:00:00+00:00",
        "command": ["pretrain_gpt.py", "--lr", "0.01", "--swiglu", "--lr", "0.02", "--metrics-dir=a b"],
        "iteration": STEPS,
        "train_iterations": STEPS,
        "final_loss": 2.1875,
        "best_loss": 2.1625,
        "train_loss": {"lm loss": train_loss(STEPS)},
        "evaluations": evaluations,
        "layout": {"world": 2, "tensor": 2},
        "versions": {"megatron-patch": "0.1.0", "torch": "2.14.1"},
        "arguments": {
            "hidden_size": 64,
            "base_hidden_size": 16,
            "width_scaling": "sqrt",
            "adam_beta1": 0.9,
            "lr": 0.01,
            "tensorboard_log_interval": 1,
            "metrics_dir": None,
            **arguments,
        },
        "updated": "2026-01-01T10:02:05+00:00",
        **(content or {}),
    }
    (folder / "run.json").write_text(json.dumps(record))


def write_hyperparameters(folder: Path) -> None:
    """Write hyperparameters.json with a parameter of every class."""
    parameters = [
        {
            "name": f"{name}.weight",
            "class": name,
            "shape": [64, 64],
            "fan_in": 64,
            "base_fan_in": 16.0,
            "m": 4.0 if name == "matrix" else 1.0,
            "lr": lr,
            "weight_decay": weight_decay,
            "eps": 1e-8,
        }
        for name, (lr, weight_decay) in CLASSES.items()
    ]
    content = {"rule": "sqrt", "exponents": [0.5, 0.5], "base": {"hidden_size": 16}, "source": "arXiv 2510.19093"}
    (folder / "hyperparameters.json").write_text(json.dumps({**content, "iteration": 0, "parameters": parameters}))


def write_events(folder: Path, iterations: Sequence[int], offset: float = 0.0) -> None:
    """Write one TensorBoard file as Megatron does, with the traps it sets: texts of flags, the test loss."""
    writer = SummaryWriter(folder)
    writer.add_text("lr", "0.01", global_step=iterations[0])
    writer.add_text("weight_decay", "0.1", global_step=iterations[0])
    for iteration in iterations:
        writer.add_scalar("lm loss", train_loss(iteration) + offset, iteration)
        writer.add_scalar("lm loss vs samples", train_loss(iteration) + offset, 8 * iteration)
        writer.add_scalar("learning-rate", 0.01 * lr_factor(iteration), iteration)
        writer.add_scalar("grad-norm", 1 / iteration, iteration)
        for name, (lr, weight_decay) in CLASSES.items():
            writer.add_scalar(f"lr/{name}", lr * lr_factor(iteration), iteration)
            writer.add_scalar(f"weight_decay/{name}", weight_decay, iteration)
    writer.add_scalar("lm loss validation", 2.1875, iterations[-1])
    writer.add_scalar("lm loss validation", 2.203125, iterations[-1])
    writer.close()


def alignment_line(iteration: int, layer: str, fan_in: int, **values: Any) -> dict[str, Any]:
    """One line of alignment.jsonl."""
    lr = 0.005 * lr_factor(iteration)
    update = 0.8 / math.sqrt(fan_in)
    line = dict.fromkeys(KEYS) | {
        "iteration": iteration,
        "layer": layer,
        "kind": "column",
        "fan_in": fan_in,
        "fan_out": 64,
        "m": 4.0,
        "lr": lr,
        "weight_decay": 0.2,
        "tokens": 64,
        "weight_norm": 2.0,
        "weight_alignment": 1 / math.sqrt(fan_in),
    }
    if lr > 0:
        line |= {
            "update_norm": lr,
            "relative_update": lr / 2,
            "update_alignment": update,
            "alignment_ratio": update * math.sqrt(fan_in),
            "relative_representation_change": update * math.sqrt(fan_in) * lr / 2,
        }
    return line | values


def write_metrics(folder: Path, iterations: Sequence[int], layers: int = 3) -> None:
    """Write alignment.jsonl, equilibrium.jsonl and sublayers.jsonl."""
    alignment, equilibrium, sublayers = (
        JsonLines(f"{folder}/{name}.jsonl", 0) for name in ("alignment", "equilibrium", "sublayers")
    )
    for iteration in iterations:
        names = [(f"decoder.layers.{i}.{name}", fan_in) for i in range(layers) for name, fan_in in LAYERS.values()]
        lines = [alignment_line(iteration, name, fan_in) for name, fan_in in [*names, ("output_layer", 64)]]
        alignment.write(lines)
        equilibrium.write(
            [
                {
                    "iteration": iteration,
                    "layer": line["layer"],
                    "weight_rms": 0.03,
                    "predicted_weight_rms": 0.024,
                    "relative_update": line["relative_update"],
                    "predicted_relative_update": line["lr"] / 0.024 if line["lr"] else None,
                    "equilibrium_relative_update": 0.04 if line["lr"] else None,
                    "normalised_top_singular_value": None,
                }
                for line in lines
            ]
        )
        sublayers.write([{"iteration": iteration, "layer": "decoder.layers.0.mlp", "input_rms": 1.0, "gain": 0.5}])
