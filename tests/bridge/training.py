"""A rank of a training with Bridge's own `pretrain`, in a process of its own.

    python -m tests.bridge.training '{"settings": {...}, ...}'      -> the last line printed: JSON of what happened

Model, weights and data are those of the float64 reference (tests/support/reference.py), hence also those of the plain
Megatron runs of tests/support/training.py with the same flags.
"""

import json
import os
import sys
from typing import Any

from tests.support.reference import EPS, Model

LLAMA = Model()


def recipe(
    tp: int = 1,
    train_iters: int = 3,
    distributed: bool = False,
    save: str | None = None,
    load: str | None = None,
    save_interval: int | None = None,
    optimizer: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    decay: str = "constant",
    tensorboard: str | None = None,
    evaluations: int = 0,
    **_: Any,
) -> Any:
    """Return the ConfigContainer of a small GPT, as a user's recipe would."""
    from dataclasses import dataclass

    import torch
    from megatron.bridge.data.base import DatasetProvider
    from megatron.bridge.models.gpt.gpt_builder import local_layer_spec
    from megatron.bridge.models.gpt_provider import GPTModelProvider
    from megatron.bridge.training.config import (
        CheckpointConfig,
        ConfigContainer,
        DistributedDataParallelConfig,
        DistributedInitConfig,
        LoggerConfig,
        OptimizerConfig,
        RNGConfig,
        SchedulerConfig,
        TrainingConfig,
        ValidationConfig,
    )
    from megatron.bridge.training.tokenizers.config import TokenizerConfig
    from torch.utils.data import Dataset

    from tests.support.training import _sequence

    class Sequences(Dataset[Any]):
        def __init__(self, size: int, first: int) -> None:
            self.size, self.first = size, first

        def __len__(self) -> int:
            return self.size

        def __getitem__(self, index: int) -> dict[str, Any]:
            return _sequence(self.first + index, LLAMA.length, LLAMA.vocabulary - 1)

    @dataclass
    class Provider(DatasetProvider):  # type: ignore[misc]
        seq_length: int = LLAMA.length
        skip_getting_attention_mask_from_dataset: bool = True

        def build_datasets(self, context: Any) -> tuple[Any, Any, Any]:
            sizes = (context.train_samples, context.valid_samples, context.test_samples)
            train, valid, test = (
                Sequences(size, first) if size else None
                for size, first in zip(sizes, (0, 10**6, 2 * 10**6), strict=True)
            )
            return train, valid, test

    Provider.__qualname__ = "Provider"
    globals()["Provider"] = Provider  # Bridge saves a config's classes by name

    of_model: dict[str, Any] = {
        "num_layers": LLAMA.layers,
        "hidden_size": LLAMA.hidden,
        "num_attention_heads": LLAMA.heads,
        "num_query_groups": LLAMA.groups,
        "ffn_hidden_size": LLAMA.ffn,
        "seq_length": LLAMA.length,
        "vocab_size": LLAMA.vocabulary,
        "transformer_layer_spec": local_layer_spec,
        "position_embedding_type": "learned_absolute",
        "share_embeddings_and_output_weights": False,
        "use_cpu_initialization": True,
        "normalization": LLAMA.norm,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "bias_activation_fusion": False,
        "persist_layer_norm": False,
        "gradient_accumulation_fusion": False,
        "cross_entropy_loss_fusion": False,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "pipeline_dtype": torch.float32,
        "tensor_model_parallel_size": tp,
        "make_vocab_size_divisible_by": 16,
        **(model or {}),
    }
    of_optimizer: dict[str, Any] = {
        "lr": 1e-2,
        "min_lr": 0.0,
        "weight_decay": 0.1,
        "adam_eps": EPS,
        **(optimizer or {}),
    }
    of_optimizer |= {"optimizer": "adam", "use_distributed_optimizer": distributed, "params_dtype": torch.float32}
    return ConfigContainer(
        model=GPTModelProvider(**of_model),
        train=TrainingConfig(
            train_iters=train_iters, global_batch_size=8, micro_batch_size=2, manual_gc=False, exit_interval=None
        ),
        validation=ValidationConfig(eval_iters=evaluations, eval_interval=1000),
        optimizer=OptimizerConfig(**of_optimizer),
        scheduler=SchedulerConfig(
            start_weight_decay=0.1,
            end_weight_decay=0.1,
            weight_decay_incr_style="constant",
            lr_decay_style=decay,
            lr_warmup_iters=0,
            lr_decay_iters=100,
        ),
        ddp=DistributedDataParallelConfig(
            use_distributed_optimizer=distributed, overlap_grad_reduce=False, overlap_param_gather=False
        ),
        dataset=Provider(num_workers=0, dataloader_type="single"),
        logger=LoggerConfig(log_interval=1, tensorboard_dir=tensorboard, tensorboard_log_interval=1),
        tokenizer=TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=LLAMA.vocabulary - 1),
        checkpoint=CheckpointConfig(save=save, load=load, save_interval=save_interval, async_save=False),
        dist=DistributedInitConfig(distributed_backend="gloo"),
        rng=RNGConfig(seed=1234),
    )


def ready() -> None:
    """Let Bridge be imported, and be run without a GPU."""
    from megatron_patch.upstream.cpu.platform import activate

    activate()
    from tests.bridge.stand_ins import load

    load()
    import megatron.bridge.training.initialize as initialize

    from megatron_patch.upstream.datasets import skip_compile_helpers

    initialize.compile_helpers = skip_compile_helpers(initialize.compile_helpers)


def run(options: dict[str, Any]) -> dict[str, Any]:
    """Train as `options` say, and return what happened on this rank."""
    ready()
    from megatron.bridge.training.callbacks import Callback
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    import megatron_patch.bridge
    from megatron_patch.upstream.width.audit import live_groups
    from tests.support.reference import scatter_weights
    from tests.support.training import global_names

    happened: dict[str, Any] = {"losses": [], "groups": [], "scheduler": None, "error": None}

    class Watch(Callback):  # type: ignore[misc]
        def on_train_start(self, context: Any) -> None:
            from megatron.core import parallel_state
            from megatron.core.utils import get_model_config

            from megatron_patch.config import WidthConfig
            from megatron_patch.upstream.width.parameters import describe

            happened["scheduler"] = context.scheduler.state_dict()
            if options.get("tamper"):
                next(g for g in context.optimizer.param_groups if g["params"])["max_lr"] *= 1.01
            if not options.get("load"):
                parameters = list(
                    describe(context.model, get_model_config(context.model[0]), WidthConfig(), parallel_state)
                )
                scatter_weights(parameters, context.optimizer, parallel_state, LLAMA.gated)

        def on_train_step_end(self, context: Any) -> None:
            happened["losses"].append(float(context.loss_dict["lm loss"]))
            self.note(context)

        def note(self, context: Any) -> None:
            names = {id(parameter): name for name, parameter in global_names(context.model).items()}
            happened["groups"].append(
                {
                    names[id(p)]: {key: group.get(key) for key in ("lr", "max_lr", "min_lr", "weight_decay", "eps")}
                    for group, parameters in live_groups(context.optimizer)
                    for p in parameters
                }
            )

    cfg = recipe(**options)
    callbacks: list[Any] = [Watch()]
    try:
        cfg, ours = megatron_patch.bridge.apply(cfg, **options.get("settings", {}))
        callbacks += [] if options.get("forget_callbacks") else ours
        pretrain(cfg, forward_step, callbacks=callbacks)
    except Exception as error:
        if options.get("raise"):
            raise
        happened["error"] = [type(error).__name__, str(error)]
    return happened


if __name__ == "__main__":
    told = run(json.loads(sys.argv[1]))
    print(json.dumps(told, default=str), flush=True)
    os._exit(0)
