"""Training of the mixed model for a few steps in every layout: what each rank measures, and what its groups hold."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron_patch.plain import AlignmentMeter, audit, width_groups
from tests.support.plain_models import mixed, proxy

STEPS, MEASURED = 4, (2, 4)
PLAN: dict[str, Any] = {"rule": "independent", "lr": 0.01, "weight_decay": 0.1}
# With the usual eps Adam's first updates are the sign of the gradient, where it is rounding noise too.
ADAM: dict[str, Any] = {"eps": 1e-4}


def batch(step: int) -> torch.Tensor:
    """The global batch of a step: 5 sequences of 9 tokens, so that two ranks have different numbers of them."""
    return torch.randint(0, 13, (5, 9), generator=torch.Generator().manual_seed(step))


def initialised_engine(model: nn.Module, groups: Any, stage: int, **more: Any) -> Any:
    """DeepSpeed's engine on CPU; no extension is compiled."""
    import deepspeed

    # Serves inference only; without it nothing has to be compiled.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config = {
        "train_micro_batch_size_per_gpu": 3,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # 1.0 by default, which the other layouts do not have
        **more.pop("config", {}),
    }
    optimizer = more.pop("optimizer", None)
    if optimizer is None and "optimizer" not in config:
        optimizer = torch.optim.AdamW(groups, **ADAM)
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=groups, optimizer=optimizer, config=config, dist_init_required=False, **more
    )
    return engine


def wrapped(model: nn.Module, layout: str) -> nn.Module:
    """The model as DDP or `fully_shard` have it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if layout == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if layout in ("fsdp", "hsdp"):
        shape, names = ((ranks,), ("shard",)) if layout == "fsdp" else ((1, ranks), ("replicate", "shard"))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for part in (model.fc1, model.mixing):
            fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def train(layout: str, config: dict[str, Any] | None = None) -> dict[str, Any]:
    """Train on this rank's part of every batch.

    Args:
        layout: "one", "ddp", "fsdp", "hsdp", "zero0" to "zero3".
        config: more of DeepSpeed's.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model = wrapped(mixed(), layout)
    groups = width_groups(model, base=proxy(), **PLAN)
    engine = None
    if layout.startswith("zero"):
        engine = initialised_engine(model, groups, int(layout[-1]), config=config or {})
    optimizer = engine or torch.optim.AdamW(groups, **ADAM)
    meter = AlignmentMeter(engine or model, None if engine else optimizer, tokens=10**6)
    result: dict[str, Any] = {"lines": [], "held": [], "unmeasured": meter.unmeasured}
    for step in range(1, STEPS + 1):
        mine = batch(step).chunk(ranks)[rank]
        if step in MEASURED:
            meter.begin(step)
            result["held"].append(meter.held_bytes)
        # DDP and its like average over ranks.
        loss = 0.05 * ranks * (engine or model)(mine).float().square().sum()
        if engine is not None:
            engine.backward(loss)
            engine.step()
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if step in MEASURED:
            result["lines"] += meter.end()
    audited = audit(optimizer)
    result["groups"] = audited.lines
    result["optimizer"] = type(engine.optimizer).__name__ if engine else ""
    result["values"] = {
        name: (group["lr"], group["weight_decay"])
        for group in (engine.optimizer if engine else optimizer).param_groups
        for name in group["names"]
    }
    return result
