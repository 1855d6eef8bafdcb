"""Pretrain a language model on the megatron-core 0.19 wheel alone: an ordinary Megatron script, no checkout needed.

The model comes from Megatron's own flags: a hybrid one with ``--hybrid-layer-pattern``, else a GPT (dense, MoE, MLA;
multi-token prediction; Transformer Engine or local layers, whatever ``--transformer-impl`` says). The data come from
``--data-path`` and its relatives or from ``--mock-data``. Tensor, pipeline and context parallelism are Megatron's.
Other training modes are refused rather than half done: see ``REFUSED``.

    torchrun --nproc_per_node 8 launch/pretrain.py --num-layers 20 --hidden-size 1024 ...
    torchrun --nproc_per_node 8 launch/pretrain.py --hybrid-layer-pattern "M*-M*-|M*-M*-" --hidden-size 1024 ...
"""

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.datasets import utils as dataset_utils
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.utils import (
    StragglerDetector,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_timers, pretrain, print_rank_0
from megatron.training.argument_utils import (
    gpt_config_from_args,
    hybrid_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")
SPIKY_LOSS_FACTOR = 10  # --check-for-spiky-loss complains about a loss this many times the largest one seen

# Flags that need another batch, loss or training loop than the ones below.
REFUSED = (
    "sft fim_data perform_rl_step hybrid_context_parallel inprocess_restart "
    "dataloader_inter_document_masking overlap_moe_expert_parallel_comm logits_load_dir logits_save_dir"
).split()

straggler_timer = StragglerDetector()


def predicts_further(vp_stage: int | None) -> bool:
    """Return whether this stage has layers of multi-token prediction, which need tokens and labels."""
    args = get_args()
    layout = args.pipeline_model_parallel_layout
    if isinstance(layout, str):
        layout = PipelineParallelLayerLayout.from_str(layout, args.pipeline_model_parallel_size)
    return bool(mtp_on_this_rank(layout, args.mtp_num_layers, ignore_virtual=False, vp_stage=vp_stage))


def needs_batch(vp_stage: int | None) -> bool:
    """Return whether this stage reads tokens or labels."""
    return bool(is_first_or_last_pipeline_stage(vp_stage)) or predicts_further(vp_stage)


def get_batch(data_iterator: Iterator[dict[str, torch.Tensor]], vp_stage: int | None) -> dict[str, Any]:
    """The tensors of one micro batch that this rank needs, [micro batch, sequence / context parallel size]; else None.

    The data loader runs on tensor parallel rank 0 of the stages that need one; Megatron broadcasts from there and cuts
    the sequence for context parallelism.
    """
    args = get_args()
    if not needs_batch(vp_stage):
        return dict.fromkeys(BATCH_KEYS)
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    batch: dict[str, Any] = {}
    if tp_rank == 0:
        sample = next(data_iterator)
        batch = {key: sample[key].cuda(non_blocking=True) if key in sample else None for key in BATCH_KEYS}
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=parallel_state.get_tensor_model_parallel_src_rank(),
        broadcast_group=parallel_state.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=predicts_further(vp_stage),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=parallel_state.is_pipeline_first_stage(),
        is_pipeline_last_stage=parallel_state.is_pipeline_last_stage(),
    )
    batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=parallel_state.get_context_parallel_group())
    return {key: batch[key] for key in BATCH_KEYS}


def loss_func(loss_mask: torch.Tensor, token_losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Sum of the unmasked token losses of one micro batch, their number, and both for Megatron's log."""
    mask = loss_mask.view(-1).float()
    loss = torch.sum(token_losses.view(-1).float() * mask)
    num_tokens = mask.sum().detach().to(torch.int)

    args = get_args()
    machine = get_rerun_state_machine()
    rejections: list[tuple[Callable[[torch.Tensor], Any], str, bool]] = []
    if args.check_for_nan_in_loss_and_grad:
        rejections.append((torch.isnan, "NaN in the local forward loss", True))
        rejections.append((torch.isinf, "Inf in the local forward loss", True))
    if args.check_for_spiky_loss:
        spiky = partial(machine.is_unexpectedly_large, threshold=SPIKY_LOSS_FACTOR, context="loss")
        rejections.append((spiky, "spiky loss", False))
    for rejection, message, fatal in rejections:
        machine.validate_result(result=loss, rejection_func=rejection, message=message, tolerance=0.0, fatal=fatal)

    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.float()])}


def forward_step(
    data_iterator: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module
) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, dict[str, Any]]]]:
    """Forward pass of one micro batch: the stage's output and, for the last stage, how to turn it into a loss."""
    timer = get_timers()("batch-generator", log_level=2)
    timer.start()
    with straggler_timer(bdata=True):
        batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    timer.stop()
    with straggler_timer:
        output = model(batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"])
    return output, partial(loss_func, batch["loss_mask"])


def dataset_config(args: Any) -> GPTDatasetConfig:
    """Megatron's dataset settings from its flags."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    counts = args.per_dataset_sequences_path
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        sequences_per_dataset=json.loads(Path(counts).read_text()) if counts is not None else None,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
    )


def datasets_provider(num_samples: list[int], vp_stage: int | None = None) -> Any:
    """Train, validation and test dataset; None on ranks whose batches come by broadcast or are not needed."""
    args = get_args()
    print_rank_0("> building train, validation and test datasets")

    def built_here() -> bool:
        first_tp_rank = parallel_state.get_tensor_model_parallel_rank() == 0
        return first_tp_rank and needs_batch(vp_stage)

    dataset_class = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(dataset_class, num_samples, built_here, dataset_config(args)).build()


datasets_provider.is_distributed = True  # type: ignore[attr-defined]  # Megatron: call it on every rank


def keep_wheel_helpers() -> None:
    """Do not let Megatron run `make` for its dataset index builder where the wheel has brought it compiled.

    The 0.19.2 wheel ships ``helpers_cpp`` but no Makefile, and ``compile_helpers()`` then exits the process.
    """
    folder = Path(dataset_utils.__file__).parent
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") and not (folder / "Makefile").exists():
        dataset_utils.compile_helpers = lambda: None


def main() -> None:
    """Parse Megatron's flags and train."""
    keep_wheel_helpers()
    args = parse_and_validate_args()
    mistakes = [
        f"--{name.replace('_', '-')} is not supported by {__file__}; use Megatron-LM's own script"
        for name in REFUSED
        if getattr(args, name)
    ]
    if not args.mock_data and not any(get_blend_and_blend_per_split(args)):
        mistakes.append("no data: give --data-path (or --train-data-path and the like), or --mock-data for a trial run")
    if mistakes:
        print_rank_0("\n".join(mistakes), rank=args.rank)
        sys.exit(2)
    model = hybrid_config_from_args(args) if args.hybrid_layer_pattern else gpt_config_from_args(args)
    config = pretrain_cfg_container_from_args(args, model)
    pretrain(config, datasets_provider, ModelType.encoder_or_decoder, forward_step)


if __name__ == "__main__":
    main()
