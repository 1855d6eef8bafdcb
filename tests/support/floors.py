"""The floors of the package: what each folder is for, and what it may import. docs/architecture.md draws them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Floor:
    """A folder of the package, or a module at its top."""

    why: str
    imports: str = ""
    """Which floors it may import from, beside itself."""
    packages: str = ""
    """Which packages from outside it may import, beside the standard library."""


FLOORS = {
    "theory": Floor("the papers' rules, schedules and models: numbers in, numbers out"),
    "version": Floor("the one version number"),
    "errors": Floor("what a user can do wrong, in one text format"),
    "files": Floor(
        "what a run writes and a user types: type, writer, reader, constants together", "errors version", "yaml"
    ),
    "config": Floor("our flags as values that know what contradicts what", "errors theory files"),
    "hosts": Floor("a run on several hosts: checked, compared, watched, ended everywhere, judged", "errors files"),
    "metrics": Floor("what is measured, exact on any number of ranks", "errors theory files config", "torch"),
    "kernels": Floor("in plain torch, what Megatron takes from CUDA libraries", "errors", "torch"),
    "zero": Floor("what DeepSpeed's ZeRO keeps of a model, and where", "errors", "torch deepspeed"),
    "upstream": Floor(
        "the hooks: what knows Megatron and Transformer Engine, and DeepSpeed under Megatron's loop",
        "errors theory files config hosts metrics kernels zero",
        # packaging: the versions that Megatron compares are its objects
        "torch packaging megatron deepspeed",
    ),
    "bridge": Floor(
        "the same through the doors of NVIDIA's Megatron-Bridge: one call of a recipe",
        "errors files config metrics upstream",
        "torch megatron",
    ),
    "plain": Floor(
        "rules, warmups, audit and metrics for any torch model: DDP, FSDP2, DeepSpeed's engine; without Megatron",
        "errors theory metrics zero",
        "torch",
    ),
    "runs": Floor("what runs left behind, ours and others', read back", "errors files config", "tensorboard wandb"),
    "fit": Floor(
        "where a loss is lowest, and what that says of transfer", "errors theory runs", "numpy scipy threadpoolctl"
    ),
    "data": Floor(
        "from text to tokens",
        "errors files upstream",
        "datasets numpy pyarrow sentencepiece transformers rich",
    ),
    "sweep": Floor("many runs over a grid or a search", "errors files runs", "optuna rich yaml"),
    "transfer": Floor("from a sweep to the target's config", "errors theory files config runs fit", "yaml rich"),
    "report": Floor(
        "runs and sweeps as one page",
        "errors theory files runs fit",
        "matplotlib jinja2 markupsafe numpy rich",
    ),
    "selfcheck": Floor(
        "one command that tries everything on the machine at hand",
        "errors files config upstream report",
        "torch megatron transformer_engine",
    ),
    "entry": Floor(
        "the commands",
        "version errors theory files config upstream data sweep transfer report hosts selfcheck",
        "rich",
    ),
}
