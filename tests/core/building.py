"""A small GPT and its optimizer out of megatron.core alone, in a process of its own: what `test_core.py` looks at.

    python -m tests.core.building {"rule": "independent", ...}      -> one line of JSON, the last that is printed

Nothing of `megatron.training` is imported, so this runs at every version of megatron-core that the package's param
groups, scheduler and audit support.
"""

import json
import os
import sys
from typing import Any

BASE_LR, MIN_LR, WEIGHT_DECAY, EPS = 0.01, 0.001, 0.1, 1e-8
HIDDEN, FFN, BASE_HIDDEN, BASE_FFN = 32, 64, 8, 32


def build_model() -> tuple[Any, Any]:
    """Return (the model in Megatron's DDP, its config): 2 layers, no process but this one."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        ffn_hidden_size=FFN,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=64,
        max_sequence_length=16,
        share_embeddings_and_output_weights=False,
    )
    return DistributedDataParallel(config, DistributedDataParallelConfig(), model), config


def build(settings: dict[str, Any]) -> dict[str, Any]:
    """Return what the optimizer trains every parameter with, before and after a resume, and what the audit says."""
    from megatron.core import parallel_state
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
    from megatron.core.optimizer.optimizer import param_group_identifier_keys

    from megatron_patch.config import WidthConfig
    from megatron_patch.errors import AuditError
    from megatron_patch.upstream.width.audit import audit_build, audit_groups, audit_schedule, live_groups
    from megatron_patch.upstream.width.parameters import describe
    from megatron_patch.upstream.width.plan import config_overrides, make_plan
    from megatron_patch.upstream.width.scheduler import ExtraWarmup, WidthTransferScheduler

    model, model_config = build_model()
    width = WidthConfig(settings["rule"], base_hidden_size=BASE_HIDDEN, base_dimensions={"ffn_hidden_size": BASE_FFN})
    config = OptimizerConfig(
        optimizer="adam", lr=BASE_LR, min_lr=MIN_LR, weight_decay=WEIGHT_DECAY, adam_eps=EPS, clip_grad=0.0
    )
    plan = make_plan(list(describe([model], model_config, width, parallel_state)), width, config, WEIGHT_DECAY)
    names = {id(p.parameter): p.spec.name for p in plan.parameters}

    def make() -> tuple[Any, Any]:
        overrides = {**get_standard_config_overrides(config), **config_overrides(plan)}
        optimizer = get_megatron_optimizer(config, [model], config_overrides=overrides)
        audit_build(plan, optimizer)
        scheduler = WidthTransferScheduler(
            optimizer,
            init_lr=0.0,
            max_lr=BASE_LR,
            min_lr=MIN_LR,
            lr_warmup_steps=20,  # in samples, as everything here
            lr_decay_steps=100,
            lr_decay_style="linear",
            start_wd=WEIGHT_DECAY,
            end_wd=WEIGHT_DECAY,
            wd_incr_steps=100,
            wd_incr_style="constant",
            use_checkpoint_opt_param_scheduler=False,
            warmup=ExtraWarmup(settings.get("warmup", "none"), m=HIDDEN / BASE_HIDDEN, steps=10),
        )
        return optimizer, scheduler

    def live(optimizer: Any) -> dict[str, dict[str, float]]:
        return {
            names[id(parameter)]: {key: float(group[key]) for key in ("max_lr", "min_lr", "lr", "weight_decay", "eps")}
            for group, parameters in live_groups(optimizer)
            for parameter in parameters
        }

    optimizer, scheduler = make()
    found: dict[str, Any] = {"classes": {p.spec.name: p.spec.role for p in plan.parameters}, "lrs": []}
    found["keys"] = [[g.get(key) for key in param_group_identifier_keys] for g, _ in live_groups(optimizer)]
    for _ in range(int(settings.get("steps", 6))):  # 4 samples each
        audit_schedule(plan, optimizer, scheduler)
        found["lrs"].append(scheduler.optimizer.param_groups[0]["lr"] / scheduler.optimizer.param_groups[0]["max_lr"])
        scheduler.step(4)
    found["live"] = live(optimizer)
    # With no gradient AdamW does nothing but decay.
    before = {p.spec.name: p.parameter.detach().clone() for p in plan.parameters}
    model.zero_grad_buffer()
    optimizer.step()
    found["shrunk"] = {
        p.spec.name: float((p.parameter.detach().double().norm() / before[p.spec.name].double().norm()).item())
        for p in plan.parameters
        if before[p.spec.name].norm() > 0
    }
    saved = optimizer.state_dict(), scheduler.state_dict()
    again, scheduler_again = make()
    again.load_state_dict(saved[0])
    scheduler_again.load_state_dict(saved[1])
    audit_groups(plan, again)
    audit_schedule(plan, again, scheduler_again)
    found["resumed"] = live(again)
    optimizer.param_groups[0]["max_lr"] *= 2
    try:
        audit_groups(plan, optimizer)
    except AuditError as error:
        found["refusal"] = str(error)
    found["training"] = sorted(name for name in sys.modules if name.startswith("megatron.training"))
    return found


if __name__ == "__main__":
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    from megatron_patch.upstream.cpu.platform import CpuPlatform, prepare_environment
    from megatron_patch.upstream.cpu.torch_stand_ins import TORCH_STAND_INS

    prepare_environment()
    CpuPlatform(TORCH_STAND_INS)  # not those in Megatron, which are for 0.19
    import megatron.core

    print(json.dumps({"version": megatron.core.__version__, **build(json.loads(sys.argv[1]))}))
