"""What is seen of a run, in its process: losses, live LR and weight decay, weights, and metrics in float64."""

import hashlib
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megatron_patch.config import WidthConfig
from megatron_patch.files.run_json import LOSS
from megatron_patch.selfcheck.cost import Clock
from megatron_patch.selfcheck.exact import Inputs, exact_metrics
from megatron_patch.selfcheck.seen import save
from megatron_patch.selfcheck.sizes import ZEROED
from megatron_patch.upstream.cpu.platform import is_active
from megatron_patch.upstream.hooks import Hook, around
from megatron_patch.upstream.monitor.masters import find_masters
from megatron_patch.upstream.patch import Session
from megatron_patch.upstream.width.audit import child_optimizers, live_groups
from megatron_patch.upstream.width.parameters import NamedParameter, describe


def begin(spec: Mapping[str, Any]) -> None:
    """Hook Megatron's `train_step` once, for this process.

    Args:
        spec: how to watch: `mode`, `result` (path without the rank), `steps`, `exact`.
    """
    watch = Clock(spec) if spec["mode"] == "cost" else Watch(spec)
    names = ("model", "optimizer", "opt_param_scheduler", "iteration")
    hook = Hook("megatron.training.training:train_step", names, around(watch.step, *names), "watch every step")
    Session().add((hook,))


class Watch:
    """Watches the steps of a run of the proxy. The weights it starts from are a function of their names alone."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        self._spec = spec
        self._parameters: list[NamedParameter] = []
        self._step = 0
        self._inputs: Inputs | None = None
        self._seen: dict[str, Any] = {"losses": {}, "live": {}, "shrunk": {}, "exact": {}, "actual": {}, "digests": {}}

    def step(self, call: Callable[[], Any], model: Any, optimizer: Any, scheduler: Any, iteration: int) -> Any:
        """Stand around one `train_step`; `iteration` counts from 0."""
        self._step = iteration + 1
        if not self._parameters:
            self._first(model, optimizer, iteration)
        self._seen["live"][self._step] = self._live(optimizer)
        exact = self._step in self._spec["exact"]
        self._inputs = Inputs(model) if exact else None
        result = call()
        losses = result[0] or {}
        if LOSS in losses:
            self._seen["losses"][self._step] = float(losses[LOSS])
        if self._step == self._spec["steps"]:
            self._seen["digests"] = {p.spec.name: digest(p.parameter) for p in self._parameters}
            if not is_active():
                self._seen["peak_bytes"] = torch.cuda.max_memory_allocated()
            save(self._spec, self._seen)
        return result

    def _first(self, model: Any, optimizer: Any, iteration: int) -> None:
        from megatron.core import parallel_state
        from megatron.core.utils import get_model_config

        config = get_model_config(model[0])
        self._parameters = list(describe(model, config, WidthConfig(), parallel_state))
        self._gated = bool(config.gated_linear_unit)
        self._config = config
        # Weights born in FP8 stay what they are: that run is compared with no other.
        if iteration == 0 and not any(is_quantised(p.parameter) for p in self._parameters):
            set_weights(self._parameters, optimizer, parallel_state, self._gated)
        update = optimizer.step

        def step(*args: Any, **kwargs: Any) -> Any:
            with self._around_update(optimizer):
                return update(*args, **kwargs)

        optimizer.step = step

    @contextmanager
    def _around_update(self, optimizer: Any) -> Iterator[None]:
        if self._step <= ZEROED:
            for p in self._parameters:
                gradient = getattr(p.parameter, "main_grad", None)
                if gradient is not None:
                    gradient.zero_()
        looked_at = self._step == ZEROED or self._inputs is not None
        before = fp32_weights(self._parameters, optimizer) if looked_at else {}
        multiplied = {p.spec.name: plain(p.parameter).clone() for p in self._parameters} if self._inputs else {}
        yield
        after = fp32_weights(self._parameters, optimizer) if looked_at else {}
        if self._step == ZEROED:
            self._seen["shrunk"] = {name: shrink(before[name], after[name]) for name in before}
        if self._inputs is not None:
            live = self._seen["live"][self._step]
            updates = {
                name: after[name].double() - (1 - live[name][0] * live[name][1]) * before[name].double()
                for name in before
                if name in live
            }
            exact, actual = exact_metrics(self._inputs, multiplied, updates, self._config)
            self._seen["exact"][self._step], self._seen["actual"][self._step] = exact, actual

    def _live(self, optimizer: Any) -> dict[str, tuple[float, float]]:
        """Return LR and weight decay of every parameter of this rank, by its name."""
        names = {id(p.parameter): p.spec.name for p in self._parameters}
        return {
            names[id(parameter)]: (float(group["lr"]), float(group["weight_decay"]))
            for group, parameters in live_groups(optimizer)
            for parameter in parameters
        }


def set_weights(parameters: list[NamedParameter], optimizer: Any, groups: Any, gated: bool) -> None:
    """Overwrite matrices by this rank's shards of a normal draw that depends on name and global shape alone.

    Its standard deviation is 1/sqrt(fan-in), of embeddings 1. Gains stay as they are.

    Args:
        parameters: of this rank.
        optimizer: takes its fp32 copies from the new weights.
        groups: Megatron's `parallel_state`.
        gated: whether fc1 is [gates; ups], each of which is cut over the ranks.
    """
    for p in parameters:
        name, shape = p.spec.name, p.spec.shape
        if len(shape) != 2:
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        whole = torch.randn(*shape, generator=generator)
        if not name.startswith("embedding."):
            whole /= math.sqrt(shape[1])
        of = "expert_tensor" if ".experts." in name else "tensor_model"
        size = getattr(groups, f"get_{of}_parallel_world_size")()
        if getattr(p.parameter, "tensor_model_parallel", False) and size > 1:
            rank, dim = getattr(groups, f"get_{of}_parallel_rank")(), vars(p.parameter)["partition_dim"]
            halves = whole.chunk(2, dim) if gated and ".linear_fc1.weight" in name else (whole,)
            whole = torch.cat([half.chunk(size, dim)[rank] for half in halves], dim)
        with torch.no_grad():
            p.parameter.copy_(whole)
    optimizer.reload_model_params()


def plain(parameter: Tensor) -> Tensor:
    """Return a weight as numbers: of an FP8 tensor what its numbers and scales stand for."""
    dequantize = getattr(parameter, "dequantize", None)
    return dequantize().detach() if is_quantised(parameter) and dequantize else parameter.detach()


def is_quantised(parameter: Tensor) -> bool:
    """Return whether this is one of Transformer Engine's FP8 tensors."""
    return hasattr(parameter, "_quantizer")


def fp32_weights(parameters: list[NamedParameter], optimizer: Any) -> dict[str, Tensor]:
    """Return copies of the fp32 weights that the optimizer updates, or of this rank's slices, flat, by name.

    Those of the precision-aware optimizer are in the state of Transformer Engine's FusedAdam: as they are, or as the
    lower half of the bits whose upper half is the bf16 weight.
    """
    if any(getattr(getattr(c, "config", None), "use_precision_aware_optimizer", False) for c in _children(optimizer)):
        found = {}
        for p in parameters:
            child = next(c for c in _children(optimizer) if p.parameter in c.model_param_group_index_map)
            low: Tensor = child._get_main_param_and_optimizer_states(p.parameter)["param"]
            if low.dtype == torch.int16:
                own = child._get_model_param_range_map(p.parameter)["param"]
                low = joined(p.parameter.detach().reshape(-1)[own.start : own.end], low.reshape(-1))
            found[p.spec.name] = low.detach().float().reshape(-1).clone()
        return found
    masters = find_masters(optimizer)
    return {p.spec.name: masters(p.parameter).piece.read().detach().clone() for p in parameters}


def _children(optimizer: Any) -> list[Any]:
    return child_optimizers(optimizer)


def joined(high: Tensor, low: Tensor) -> Tensor:
    """Return the fp32 numbers of which `high` are the bf16 weights, rounded, and `low` the lower 16 bits, int16.

    The upper half was rounded up where the lower half's first bit is set.

    >>> x = torch.tensor([1.0, 1.7182818, -3.1415927])
    >>> low = (x.view(torch.int32) & 0xFFFF).to(torch.int16)
    >>> high = ((x.view(torch.int32) + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)
    >>> torch.equal(joined(high, low), x)
    True
    """
    upper = high.view(torch.int16).int() - (low < 0).int()
    return ((upper << 16) | (low.int() & 0xFFFF)).view(torch.float32)


def shrink(before: Tensor, after: Tensor) -> list[float]:
    """Return by which share of itself a weight has become smaller, and the number of its entries here.

    The share is `1 - <after, before> / <before, before>`, in which the rounding of the entries averages out.
    """
    old = before.double()
    square = float(old.square().sum())
    return [1 - float((after.double() * old).sum()) / square if square else 0.0, before.numel()]


def digest(parameter: Tensor) -> str:
    """Return a digest of the bits of a weight."""
    values = plain(parameter).float().contiguous().cpu()
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()
