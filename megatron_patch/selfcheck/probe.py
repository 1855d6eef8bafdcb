"""What machine this is: versions, GPU, driver, NCCL, Transformer Engine and what of FP8 it can do.

Run as a program, since a driver or a library that is broken may take the process with it; prints one JSON object.
"""

import importlib.metadata
import json
import os
import platform
import sys
from typing import Any

PACKAGES = (
    "megatron-core torch deepspeed transformer-engine transformer-engine-torch transformer-engine-cu13 flash-attn apex "
    "triton numpy nvidia-nccl-cu13 nvidia-cudnn-cu13 nvidia-cublas"
).split()
RECIPES = {
    "delayed": "is_fp8_available",
    "tensorwise": "is_fp8_available",
    "blockwise": "is_fp8_block_scaling_available",
    "mxfp8": "is_mxfp8_available",
}
"""Megatron's --fp8-recipe, and the function of Transformer Engine that says whether the device has it."""


def versions() -> dict[str, str]:
    """Return the versions of what is installed."""
    found = {"python": platform.python_version(), "system": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """Return the name of the processor."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def driver() -> str | None:
    """Return the version of NVIDIA's kernel driver."""
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as file:
            return file.readline().strip()
    except OSError:
        return None


def gpu_facts() -> dict[str, Any]:
    """Return what torch says of the GPUs; `gpus` is empty where it sees none."""
    import torch

    if not torch.cuda.is_available():
        return {"gpus": [], "torch_cuda": torch.version.cuda}
    gpus = [
        {
            "name": p.name,
            "gib": round(p.total_memory / 2**30, 1),
            "capability": f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count,
        }
        for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]
    cudnn_version: Any = torch.backends.cudnn.version
    nccl_version: Any = torch.cuda.nccl.version
    try:
        nccl = ".".join(map(str, nccl_version()))
    except Exception as error:
        nccl = f"not usable: {error}"
    return {"gpus": gpus, "torch_cuda": torch.version.cuda, "nccl": nccl, "cudnn": cudnn_version()}


def recipes() -> dict[str, str]:
    """Return for each FP8 recipe an empty text, or why this machine does not have it."""
    try:
        te = importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # whatever a half-built extension raises
        return dict.fromkeys(RECIPES, f"no Transformer Engine: {' '.join(str(error).split())[:200]}")
    found = {}
    for recipe, question in RECIPES.items():
        try:
            available, reason = getattr(te, question)(return_reason=True)
            found[recipe] = "" if available else reason or "not available"
        except Exception as error:
            found[recipe] = f"{question}: {' '.join(str(error).split())[:200]}"
    return found


def facts() -> dict[str, Any]:
    """Return everything."""
    found: dict[str, Any] = {
        "versions": versions(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "driver": driver(),
        **gpu_facts(),
    }
    found["fp8"] = recipes() if found["gpus"] else dict.fromkeys(RECIPES, "needs a GPU")
    te = "transformer-engine-torch" in found["versions"]
    found["transformer_engine"] = te and not str(found["fp8"]["delayed"]).startswith("no Transformer Engine")
    return found


if __name__ == "__main__":
    json.dump(facts(), sys.stdout)
