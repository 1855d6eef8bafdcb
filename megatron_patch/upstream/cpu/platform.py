"""Lets the unmodified Megatron trainer run on CPU with gloo: for proxies, tests and CI. Never where CUDA is present.

Order of use, in each process (plain python, torchrun or the deepspeed launcher):

    prepare_environment()                  # before torch is imported
    with activate():                       # before megatron is imported, or after; both work
        argv, said = cpu_arguments(argv)   # Megatron's flags for the CPU, and lines that say what was set
        ...                                # Megatron's parse_and_validate_args, pretrain

Nothing happens at import; this module does not import torch until `activate` is called.
"""

import importlib
import os
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from megatron_patch.errors import ConfigError, UpstreamChanged, raise_together
from megatron_patch.upstream.cpu.megatron_stand_ins import MEGATRON_STAND_INS
from megatron_patch.upstream.cpu.torch_stand_ins import TORCH_STAND_INS, StandIn, local_world_size
from megatron_patch.upstream.refusals import CPU_FIX, Feature, refused

__all__ = [
    "CPU_DEFAULTS",
    "STAND_INS",
    "CpuPlatform",
    "activate",
    "cpu_arguments",
    "is_active",
    "prepare_environment",
]

#: Every foreign attribute that is replaced while the platform is active, with the reason.
STAND_INS: tuple[StandIn, ...] = (*TORCH_STAND_INS, *MEGATRON_STAND_INS)

# --- environment -----------------------------------------------------------------------------------------------------

#: Variables the CPU platform needs, with the reason; they overrule what the shell says.
ENVIRONMENT: tuple[tuple[str, str, str], ...] = (
    ("TORCHDYNAMO_DISABLE", "1", "with torch.cuda.is_available() True, torch.compile looks for Triton on a GPU"),
    ("CUDA_DEVICE_MAX_CONNECTIONS", "1", "Megatron refuses tensor and context parallelism without it"),
    ("DS_ACCELERATOR", "cpu", "DeepSpeed would otherwise ask torch.cuda.is_available()"),
)


def prepare_environment() -> None:
    """Sets the environment variables that torch, Megatron and DeepSpeed read when they are imported.

    OMP_NUM_THREADS gets a share of the cores when unset: torchrun sets it to 1, the deepspeed launcher and plain
    python leave it, and then every rank would start one thread per core.
    """
    for name, value, _ in ENVIRONMENT:
        os.environ[name] = value
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // local_world_size())))


def has_cuda() -> bool:
    """Return whether torch sees a GPU; it says so too while the platform is active."""
    import torch

    return torch.cuda.is_available()


# --- arguments -------------------------------------------------------------------------------------------------------

#: Megatron flags without which it does not run on CPU, each as (flag and value, reason).
CPU_DEFAULTS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("--distributed-backend", "gloo"), "NCCL needs GPUs"),
    (("--transformer-impl", "local"), "Transformer Engine needs GPUs"),
    (("--attention-backend", "unfused"), "flash and fused attention are CUDA kernels"),
    (("--use-cpu-initialization",), "the same weights at every tensor-parallel size"),
    (("--no-persist-layer-norm",), "a CUDA kernel"),
    (("--no-gradient-accumulation-fusion",), "a CUDA kernel"),
    (("--no-masked-softmax-fusion",), "a CUDA kernel"),
    (("--no-bias-gelu-fusion",), "would be compiled for CUDA"),
    (("--no-bias-swiglu-fusion",), "would be compiled for CUDA"),
    (("--no-bias-dropout-fusion",), "would be compiled for CUDA"),
    (("--no-rope-fusion",), "a Transformer Engine kernel"),
)


def cpu_arguments(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Megatron's command line `argv`, extended by the `CPU_DEFAULTS` it lacks, and one line for each that was set.

    >>> argv, said = cpu_arguments(["--distributed-backend=gloo", "--transformer-impl", "local"])
    >>> argv[2:6]
    ['local', '--attention-backend', 'unfused', '--use-cpu-initialization']
    >>> said[0]
    '--cpu sets --attention-backend unfused (flash and fused attention are CUDA kernels)'

    Raises:
        ConfigError: `argv` asks for something that a CPU cannot do.
    """
    given = _given(argv)
    raise_together(refused(Feature.CPU, {flag: value or "" for flag, value in given.items()}))
    extended, said = list(argv), []
    for words, reason in CPU_DEFAULTS:
        flag, value = words[0], words[1] if len(words) > 1 else None
        if flag not in given:
            extended.extend(words)
            said.append(f"--cpu sets {' '.join(words)} ({reason})")
        elif given[flag] != value:
            raise ConfigError(flag, given[flag], f"{value} with --cpu ({reason})", CPU_FIX)
    return extended, said


def _given(argv: Sequence[str]) -> dict[str, str | None]:
    """The value of every flag in `argv`, `None` for a bare flag; of a repeated one the last, which argparse keeps."""
    found: dict[str, str | None] = {}
    for i, word in enumerate(argv):
        if not word.startswith("--"):
            continue
        flag, equals, value = word.partition("=")
        if equals:
            found[flag] = value
        else:
            following = argv[i + 1] if i + 1 < len(argv) else "--"
            found[flag] = None if following.startswith("--") else following
    return found


# --- activation ------------------------------------------------------------------------------------------------------

_ABSENT = object()
_live: "CpuPlatform | None" = None


def activate() -> "CpuPlatform":
    """Puts every stand-in in place for this process and returns the handle that takes them out again.

    A second call returns the live handle. Torch and Megatron are imported here if they have not been.

    Raises:
        ConfigError: a CUDA device is present: the platform must never hide one.
        UpstreamChanged: a name in `STAND_INS` is gone; nothing was replaced.
    """
    global _live
    if _live is not None:
        return _live
    before = dict(os.environ)
    prepare_environment()
    import torch

    if torch.cuda.is_available():
        os.environ.clear()
        os.environ.update(before)
        raise ConfigError(
            "--cpu", "", "a machine without CUDA devices", "drop --cpu, or hide them with CUDA_VISIBLE_DEVICES=''"
        )
    _live = CpuPlatform(TORCH_STAND_INS, MEGATRON_STAND_INS)
    return _live


def is_active() -> bool:
    """Return whether the stand-ins are in place in this process."""
    return _live is not None


class CpuPlatform:
    """The live stand-ins; see `activate`. Leaving it as a context manager deactivates it."""

    def __init__(self, *groups: Sequence[StandIn]) -> None:
        """Puts the groups in place one after the other; torch's first, as Megatron asks for GPUs when imported."""
        self._undo: list[Callable[[], None]] = []
        _let_torch_note_its_own()
        try:
            for group in groups:
                resolved = [_resolve(s.target) for s in group]  # check the whole group before touching any of it
                for stand_in, (owner, name, original) in zip(group, resolved, strict=True):
                    self._undo.append(_replace(owner, name, original, stand_in))
        except BaseException:
            self._restore()
            raise

    def deactivate(self) -> None:
        """Restores every replaced attribute. Environment variables stay."""
        global _live
        self._restore()
        if _live is self:
            _live = None

    def _restore(self) -> None:
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> "CpuPlatform":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.deactivate()


def _resolve(target: str) -> tuple[Any, str, Any]:
    """The object that holds the attribute `target` names, the attribute's last name, and its present value."""
    module, _, path = target.partition(":")
    *parents, name = path.split(".")
    try:
        owner: Any = importlib.import_module(module)
        for parent in parents:
            owner = getattr(owner, parent)
        return owner, name, getattr(owner, name)
    except (ImportError, AttributeError) as error:
        raise UpstreamChanged(f"the CPU platform stands in for {target}, which is not there: {error}") from error


def _replace(owner: Any, name: str, original: Any, stand_in: StandIn) -> Callable[[], None]:
    """Assigns the stand-in and returns the undo, which distinguishes an attribute that was merely inherited."""
    own = vars(owner).get(name, _ABSENT)  # the raw entry: a staticmethod must come back as one
    setattr(owner, name, stand_in.replacement(original) if stand_in.wraps else stand_in.replacement)

    def undo() -> None:
        if own is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, own)

    return undo


def _let_torch_note_its_own() -> None:
    """Makes torch build its two tables of functions before any of them is wrapped.

    `with torch.device("meta"):` recognises the factories by identity in a set that is built on first use. Built after
    activation it would hold our wrappers, the context would not see the originals they call, and would be inert.
    Importing `torch._dynamo` (Megatron does, through torch.compile) builds a table by name that refuses one function
    under two names, as `nothing` is.
    """
    from torch.utils._device import _device_constructors

    _device_constructors()
    importlib.import_module("torch._dynamo")
