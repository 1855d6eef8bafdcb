"""Megatron's arguments, validated on a machine that is not the one they are meant for."""

import math
import os
import sys
from collections.abc import Sequence
from typing import Any

from megatron_patch.config.optimizer import EMERGING
from megatron_patch.errors import ConfigError
from megatron_patch.upstream.dry.machine import assigned, machine_meant, megatrons_checks, suit
from megatron_patch.upstream.patch import megatron_parser

ASSUMED_VOCABULARY = 32_000
"""Size of the vocabulary where neither the arguments nor a readable tokenizer tell it."""


def validated(
    arguments: Sequence[str], world_size: int | None, rank: int, ignore_unknown: bool
) -> tuple[Any, list[str]]:
    """Return Megatron's namespace after its own validation and ours, and what had to be added to it.

    The hooks that put our flags into Megatron's parser and our checks around its own must be installed.

    Args:
        arguments: without the script.
        world_size: number of ranks; None = the smallest that holds one copy of the model.
        rank: whose arguments they are.
        ignore_unknown: leave out flags that no parser here knows, with a note.

    Raises:
        ConfigError: arguments that a run would be refused for.
        MegatronRefuses: the same, by Megatron.
    """
    from megatron.training import arguments as megatron

    notes = []
    with megatrons_checks(), assigned(sys, argv=["explain", *arguments]), machine_meant():
        args = megatron.parse_args(ignore_unknown_args=ignore_unknown)
        if ignore_unknown and (unknown := megatron_parser().parse_known_args(arguments)[1]):
            notes.append(f"left out, since no parser here knows it: {' '.join(unknown)}")
        _refuse_other_models(args)
        suit(args)
        args.world_size = world_size or smallest_world(args)
        args.rank = rank
        if not 0 <= rank < args.world_size:
            raise ConfigError(
                "--rank", rank, f"0 to {args.world_size - 1}, with {args.world_size} ranks", "give --world-size too"
            )
        measured = args.alignment_interval > 0 or args.spectral_interval > 0
        if measured and not (args.metrics_dir or args.save or args.tensorboard_dir):
            args.metrics_dir = os.devnull
            notes.append("a run also needs --metrics-dir, --save or --tensorboard-dir, since metrics are on")
        megatron.validate_args(args)
    return args, notes


def _refuse_other_models(args: Any) -> None:
    """Before Megatron says what it has against them."""
    if args.optimizer not in ("adam", "sgd", "dist_muon", *EMERGING):
        known = ", ".join(("adam", "sgd", *EMERGING))
        raise ConfigError("--optimizer", args.optimizer, f"one of {known}", "explain one of these")


def model_config(args: Any) -> Any:
    """Return Megatron's config of the model that the arguments ask for: a hybrid one, or a GPT."""
    from megatron.training.argument_utils import gpt_config_from_args, hybrid_config_from_args

    config = (hybrid_config_from_args if args.hybrid_layer_pattern else gpt_config_from_args)(args)
    # Megatron's trainer leaves it at its default, and does not call `finalize`, which with CUDA graphs asks for it.
    config.transformer.use_te_rng_tracker = args.te_rng_tracker
    return config


def smallest_world(args: Any) -> int:
    """Return the number of ranks that hold one copy of the model, or one for each distributed-optimizer instance."""
    model = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    experts = args.expert_model_parallel_size * args.pipeline_model_parallel_size
    experts *= args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    one = math.lcm(max(1, model * args.context_parallel_size), max(1, experts))
    return one * (args.num_distributed_optimizer_instances or 1)


def settle_vocabulary(args: Any, notes: list[str]) -> None:
    """Find out the size of the vocabulary, from the tokenizer if it can be read here."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    if args.padded_vocab_size is not None:
        return
    try:
        build_tokenizer(args)
    except Exception as error:
        if args.vocab_size is None:
            args.vocab_size = ASSUMED_VOCABULARY
            notes.append(
                f"the tokenizer cannot be read here ({' '.join(str(error).split())[:120]}): a vocabulary of "
                f"{ASSUMED_VOCABULARY:,} is assumed, which decides the shape of embedding and LM head alone; "
                "--vocab-size sets it"
            )
