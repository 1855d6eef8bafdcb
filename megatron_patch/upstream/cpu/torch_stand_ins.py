"""What the CPU platform replaces in torch, by what, and why: one tuple, `TORCH_STAND_INS`.

Megatron 0.19 assumes a CUDA device in some 70 literals and 200 calls. Torch is left as it is except for the names
listed here; `torch.cuda` stays the real module. Torch is imported inside functions only, so that
`cpu_platform.prepare_environment` can run before it.

Why the tensor factories are wrapped one by one instead of entering a `TorchFunctionMode` that maps devices: such a mode
is called for every operation and even for every `tensor.shape`, some 1,600 times in a step of a 2-layer model, which
made the step 30 % slower at width 128 and 17 % at width 256 (measured in one process, alternating steps). A factory is
called some 30 times: under 0.5 %. And a mode is per thread, an attribute is not.
"""

import contextlib
import functools
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any


@dataclass(frozen=True)
class StandIn:
    """One replaced attribute.

    Args:
        target: "module:attribute" or "module:Class.attribute".
        replacement: the new object; with `wraps`, a function from the original object to the new one.
        reason: why Megatron cannot train on CPU without it.
        wraps: whether `replacement` needs the original.
    """

    target: str
    replacement: Any
    reason: str
    wraps: bool = False


# --- devices ---------------------------------------------------------------------------------------------------------


def _on_cpu(device: Any) -> Any:
    """`device` with every way to say "CUDA" (string, torch.device, bare index) read as the CPU; all else untouched."""
    import torch

    if isinstance(device, str):
        return "cpu" if device.startswith("cuda") else device
    if isinstance(device, torch.device):
        return torch.device("cpu") if device.type == "cuda" else device
    if isinstance(device, int) and not isinstance(device, bool):
        return "cpu"
    return device


def _factory_on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """A tensor factory that makes its tensor on the CPU, in pageable memory (only the CUDA driver can pin)."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        if "pin_memory" in kwargs:
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return make


def _to_on_cpu(to: Callable[..., Any]) -> Callable[..., Any]:
    """`Tensor.to`, whose device may also be the first positional argument."""

    @functools.wraps(to)
    def move(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if args:
            args = (_on_cpu(args[0]), *args[1:])
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        return to(tensor, *args, **kwargs)

    return move


def _type_as_megatron_expects(type_: Callable[..., Any]) -> Callable[..., Any]:
    """`Tensor.type`, which tells Megatron's optimizers "torch.cuda.FloatTensor" for a "torch.FloatTensor"."""

    @functools.wraps(type_)
    def type_name(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        answer = type_(tensor, *args, **kwargs)
        if args or kwargs:
            return answer  # a conversion, not the question for the name
        # Only these modules compare names, so only they get the other answer; everybody else hears the truth.
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return answer.replace("torch.", "torch.cuda.", 1) if caller.startswith("megatron.core.optimizer") else answer

    return type_name


def local_world_size() -> int:
    """Processes on this machine; torchrun sets LOCAL_WORLD_SIZE, the deepspeed launcher LOCAL_SIZE, python neither."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


# --- streams and events: the CPU runs everything in order, so there is nothing to wait for ---------------------------


def nothing(*args: Any, **kwargs: Any) -> None:
    """Stand-in for a call without effect on a CPU."""


def _zero(*args: Any, **kwargs: Any) -> int:
    """Stand-in for a CUDA memory counter."""
    return 0


class _Stream:
    """The only stream there is. Also a context manager, as `torch.cuda.Stream` is."""

    cuda_stream = 0
    device_index = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    wait_stream = wait_event = synchronize = staticmethod(nothing)

    def query(self) -> bool:
        return True

    def record_event(self, event: "_Event | None" = None) -> "_Event":
        event = event or _Event()
        event.record()
        return event

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *exc: object) -> None:
        pass


class _Event:
    """An event that keeps the wall clock, so that Megatron's straggler timing reads real milliseconds."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seconds = 0.0

    def record(self, *args: Any) -> None:
        self.seconds = time.perf_counter()

    wait = synchronize = staticmethod(nothing)

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "_Event") -> float:
        return (end.seconds - self.seconds) * 1e3


_STREAM = _Stream()


def _current_stream(*args: Any) -> _Stream:
    return _STREAM


def _no_context(*args: Any, **kwargs: Any) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


# --- properties ------------------------------------------------------------------------------------------------------


def _device_properties(*args: Any) -> SimpleNamespace:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return SimpleNamespace(name="cpu", major=8, minor=0, total_memory=memory, multi_processor_count=os.cpu_count() or 1)


# --- random numbers: CUDA's generator is the CPU's -------------------------------------------------------------------


def _get_rng_state(device: Any = None) -> Any:
    import torch

    return torch.get_rng_state()


def set_rng_state(new_state: Any, device: Any = None) -> None:
    import torch

    torch.set_rng_state(new_state)


def _manual_seed(seed: int) -> None:
    import torch

    # Not torch.manual_seed: that one seeds "all devices", which leads back here.
    torch.default_generator.manual_seed(int(seed))


def _without_a_draw(init: Callable[..., Any]) -> Callable[..., Any]:
    """`_BaseDataLoaderIter.__init__`, which draws a seed for its workers, without moving the generator."""

    @functools.wraps(init)
    def undrawn(*args: Any, **kwargs: Any) -> None:
        import torch

        state = torch.get_rng_state()
        init(*args, **kwargs)
        torch.set_rng_state(state)

    return undrawn


# --- distributed -----------------------------------------------------------------------------------------------------


def _without_device_and_port(init_process_group: Callable[..., Any]) -> Callable[..., Any]:
    """`init_process_group` without a CUDA device; and, in plain python, without a TCP port.

    One process that no launcher started meets only itself. A store in memory cannot be refused, unlike a port, fixed
    or found to be free, that another process binds first.
    """

    @functools.wraps(init_process_group)
    def init(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("device_id", None)
        alone = "RANK" not in os.environ and kwargs.get("world_size") == 1 and kwargs.get("rank") == 0
        if alone and kwargs.get("store") is None and kwargs.get("init_method") is None and len(args) < 2:
            from torch import distributed

            module: Any = distributed  # its stubs leave out what comes from C++
            kwargs["store"] = module.HashStore()
        return init_process_group(*args, **kwargs)

    return init


# --- the list --------------------------------------------------------------------------------------------------------

#: Callables that take `device=` and make a tensor: those that Megatron calls with a CUDA device, and their siblings.
FACTORIES: tuple[str, ...] = (
    *(f"torch:{name}" for name in (
        "arange as_tensor asarray empty empty_like empty_strided eye full full_like linspace logspace ones ones_like "
        "rand rand_like randint randint_like randn randn_like randperm scalar_tensor tensor tril_indices triu_indices "
        "zeros zeros_like"
    ).split()),
    *(f"torch:Tensor.{name}" for name in "new_empty new_full new_ones new_tensor new_zeros".split()),
)  # fmt: skip

_DEVICE = "some 70 literals device='cuda' and 200 device=torch.cuda.current_device()"
_ORDER = "the CPU runs in program order: nothing to wait for"
_MEMORY = "training_log and report_memory read it; there is no CUDA memory"
_HONEST = "derived from torch.cuda.is_available: torch's own optimizers, loaders and checkpoints must know the truth"
RNG_REASON = "Megatron's RNG tracker keeps CUDA generator states; on CPU, dropout and init draw from the CPU generator"

TORCH_STAND_INS: tuple[StandIn, ...] = (
    *(StandIn(target, _factory_on_cpu, _DEVICE, wraps=True) for target in FACTORIES),
    StandIn("torch:Tensor.to", _to_on_cpu, _DEVICE, wraps=True),
    StandIn(
        "torch.utils.data.dataloader:_BaseDataLoaderIter.__init__",
        _without_a_draw,
        "its seed comes from the CPU generator, on a GPU not that of dropout; a resumed run, which makes its iterators "
        "after the states are loaded, would draw other masks than an uninterrupted one",
        wraps=True,
    ),
    StandIn("torch:Tensor.cuda", lambda tensor, *args, **kwargs: tensor, "batches and modules are moved with .cuda()"),
    StandIn("torch:Tensor.pin_memory", lambda tensor, *args: tensor, "only the CUDA driver can pin memory"),
    StandIn("torch:Tensor.record_stream", nothing, _ORDER),
    StandIn("torch:Tensor.type", _type_as_megatron_expects, "the optimizers compare type names", wraps=True),
    StandIn("torch.cuda:is_available", lambda: True, "initialize_megatron asserts it"),
    StandIn("torch.cuda:device_count", local_world_size, "no process groups and no seeds are made when it is 0"),
    StandIn("torch.cuda:current_device", lambda: 0, "an index, as upstream formats it into 'cuda:N'; see torch:zeros"),
    StandIn("torch.cuda:set_device", nothing, "called with the local rank before init_process_group"),
    StandIn("torch.cuda:device", _no_context, "entered around calls for one device"),
    StandIn("torch.cuda:get_device_properties", _device_properties, "read for the architecture; see capability"),
    StandIn("torch.cuda:get_device_capability", lambda *args: (8, 0), "8.0: bf16 yes; fp8 and Blackwell paths no"),
    StandIn("torch.cuda:get_device_name", lambda *args: "cpu", "logged"),
    StandIn("torch.cuda:synchronize", nothing, _ORDER),
    StandIn("torch.cuda:empty_cache", nothing, _MEMORY),
    StandIn("torch.cuda:Stream", _Stream, _ORDER),
    StandIn("torch.cuda:Event", _Event, _ORDER),
    StandIn("torch.cuda:stream", _no_context, _ORDER),
    StandIn("torch.cuda:set_stream", nothing, _ORDER),
    StandIn("torch.cuda:current_stream", _current_stream, _ORDER),
    StandIn("torch.cuda:default_stream", _current_stream, _ORDER),
    StandIn("torch.cuda:memory_stats", lambda *args: defaultdict(int), _MEMORY),
    StandIn("torch.cuda:memory_allocated", _zero, _MEMORY),
    StandIn("torch.cuda:max_memory_allocated", _zero, _MEMORY),
    StandIn("torch.cuda:memory_reserved", _zero, _MEMORY),
    StandIn("torch.cuda:max_memory_reserved", _zero, _MEMORY),
    StandIn("torch.cuda:device_memory_used", _zero, _MEMORY),
    StandIn(
        "torch.cuda:is_current_stream_capturing",
        lambda: False,
        "torch's optimizers ask at every step; torch 2.11 asks the driver, and raises without one (2.14 does not)",
    ),
    StandIn("torch.cuda.nvtx:range_push", nothing, "profiler marks; no CUDA profiler"),
    StandIn("torch.cuda.nvtx:range_pop", nothing, "profiler marks; no CUDA profiler"),
    StandIn("torch.cuda:get_rng_state", _get_rng_state, RNG_REASON),
    StandIn("torch.cuda:set_rng_state", set_rng_state, RNG_REASON),
    StandIn("torch.cuda:manual_seed", _manual_seed, RNG_REASON),
    StandIn("torch.cuda.random:get_rng_state", _get_rng_state, RNG_REASON),
    StandIn("torch.cuda.random:set_rng_state", set_rng_state, RNG_REASON),
    StandIn("torch.cuda.random:manual_seed", _manual_seed, RNG_REASON),
    StandIn("torch.accelerator:is_available", lambda: False, _HONEST),
    StandIn("torch.accelerator:device_count", lambda: 0, _HONEST),
    StandIn(
        "torch.distributed:init_process_group",
        _without_device_and_port,
        "gets device_id=cuda:N, refused by gloo; and one rank in plain python needs no port, which may be taken",
        wraps=True,
    ),
)
