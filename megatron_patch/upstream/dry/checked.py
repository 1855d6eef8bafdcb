"""Many command lines through Megatron's own parser and validation, one after the other, and what each would cost."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from megatron_patch.config.arguments import add_arguments
from megatron_patch.upstream import flags
from megatron_patch.upstream.dry.arguments import model_config, settle_vocabulary, smallest_world
from megatron_patch.upstream.dry.machine import assigned, machine_meant, megatrons_checks, suit

_OF_VOCABULARY = ("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file", "vocab_size", "padded_vocab_size")
_OF_PADDING = ("make_vocab_size_divisible_by", "tensor_model_parallel_size")


class Checker:
    """Validates command lines as a run would, and nothing else: no hook is installed, no process group made.

    `parser` is Megatron's with our flags, made once, since making it takes longer than all that is done with it.
    The CPU platform must be up before, where there is no GPU.
    """

    def __init__(self) -> None:
        from megatron.training import arguments

        self.parser: argparse.ArgumentParser = add_arguments(
            arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
        )
        self._vocabularies: dict[tuple[Any, ...], tuple[int, list[str]]] = {}

    def check(self, words: Sequence[str], ranks: int | None, script: bool) -> tuple[float | None, list[str]]:
        """Validate one command line and return (FLOPs of the run or None, what had to be assumed for that).

        FLOPs are Megatron's count, forward and backward over all training samples, without evaluations.

        Args:
            words: the command line without the script.
            ranks: how many the run has; None = as many as hold one copy of the model.
            script: whether a script of the user's own runs, which may know more flags and build another model.

        Raises:
            ConfigError: a run would be refused.
        """
        from megatron.training import arguments

        with (
            megatrons_checks(),
            machine_meant(),
            assigned(sys, argv=["sweep", *words]),
            assigned(arguments, add_megatron_arguments=lambda parser: self.parser),
        ):
            args = arguments.parse_args(ignore_unknown_args=script)
            suit(args)
            args.world_size = ranks or smallest_world(args)
            flags.validate_around(lambda: arguments.validate_args(args), args, self.parser.get_default)
            if script:
                return None, ["no FLOPs are counted for a script of your own, which may build another model"]
            notes = self._settle_vocabulary(args)
            model_config(args).finalize()
        return _flops(args), notes

    def _settle_vocabulary(self, args: Any) -> list[str]:
        """Give `args` the padded size of the vocabulary; a tokenizer is read once."""
        from megatron.training.vocab_utils import calculate_padded_vocab_size

        key = tuple(str(getattr(args, name, None)) for name in (*_OF_VOCABULARY, *_OF_PADDING))
        if key not in self._vocabularies:
            notes: list[str] = []
            settle_vocabulary(args, notes)
            padded = args.padded_vocab_size or calculate_padded_vocab_size(
                args.vocab_size, *(getattr(args, name) for name in _OF_PADDING), logging_enabled=False
            )
            self._vocabularies[key] = padded, notes
        args.padded_vocab_size, notes = self._vocabularies[key]
        return list(notes)


def _flops(args: Any) -> float:
    from megatron.training.training import num_floating_point_operations

    count: Callable[..., Any] = num_floating_point_operations
    samples = args.train_samples or args.train_iters * args.global_batch_size
    return float(count(args, samples))
