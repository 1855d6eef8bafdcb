"""What a step costs without the patch, with it, with metrics, with singular values: kinds of steps that take turns."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from megatron_patch.selfcheck.seen import save
from megatron_patch.upstream.cpu.platform import is_active

CYCLE = ("on", "off", "on", "metrics", "after", "off", "on", "spectral")
"""The kind of each of eight steps, of which the fourth is measured and the eighth as well, with singular values. `off`
is a step with Megatron's own scheduler and optimizer step. The step after a measured one is a kind of its own, since
what was measured may be written down in it; that of the first of a cycle counts for the one before."""
WARM_CYCLES = 1
SYNCS = frozenset(
    "cudaStreamSynchronize cudaDeviceSynchronize cudaEventSynchronize cudaMemcpy "
    "aten::_local_scalar_dense megatron_patch::to_host".split()
)
"""Events of a profile in which the host waits for the device: CUDA's, and on a CPU, where there is none, what would be
one on a GPU: reading a single number, and this package's own copies to the host."""
ON_CUDA = frozenset(name for name in SYNCS if name.startswith("cuda"))


class Clock:
    """Times the steps of a run, changes the kind of each, and traces one cycle.

    Args:
        spec: as of `watch.begin`; `trace` is the file for the trace.
    """

    def __init__(self, spec: Mapping[str, Any]) -> None:
        self._spec = spec
        self._seconds: list[tuple[int, float]] = []
        self._peaks: list[tuple[int, int]] = []
        self._began = 0.0
        self._profile: Any = None
        self._profiled: dict[str, Any] = {}

    def step(self, call: Callable[[], Any], model: Any, optimizer: Any, scheduler: Any, iteration: int) -> Any:
        """Stand around one `train_step`; a step lasts until the next one begins."""
        last = iteration + 1 == self._spec["steps"]
        self._ended(iteration - 1)
        place = iteration % len(CYCLE)
        if self._spec["steps"] - iteration == len(CYCLE):
            self._profile = torch.profiler.profile(acc_events=True)
            self._profile.__enter__()
        if on_gpu():
            torch.cuda.reset_peak_memory_stats()
        self._began = now()
        with torch.profiler.record_function(f"selfcheck step {place}"):
            result = without_patch(call, optimizer, scheduler) if CYCLE[place] == "off" else call()
            if self._profile:
                wait_for_device()
        if last:
            self._ended(iteration)
            self._profile.__exit__(None, None, None)
            self._profile.export_chrome_trace(self._spec["trace"])
            self._save()
        return result

    def _ended(self, iteration: int) -> None:
        """Note the step that ends now, unless it was traced or the first cycle was still warming up."""
        wait_for_device()
        traced = self._spec["steps"] - iteration <= len(CYCLE)
        if iteration >= WARM_CYCLES * len(CYCLE) and not traced:
            self._seconds.append((iteration % len(CYCLE), now() - self._began))
        if on_gpu() and iteration >= 0:
            self._peaks.append((iteration % len(CYCLE), torch.cuda.max_memory_allocated()))

    def _save(self) -> None:
        events = [
            (event.name, event.time_range.start, event.time_range.end, float(getattr(event, "device_time", 0)))
            for event in self._profile.events()
        ]
        save(
            self._spec,
            {
                "seconds_of_steps": self._seconds,
                "peaks": self._peaks,
                "syncs": syncs_by_step(events),
                "collectives": share_of_collectives(events),
                "kernels": longest(events),
            },
        )


def on_gpu() -> bool:
    """Return whether this process uses a GPU; not where the stand-ins for one are in place."""
    return not is_active()


def now() -> float:
    """Return seconds: of the clock on a GPU; without one of this process, since a CPU may be busy with others' work."""
    return time.perf_counter() if on_gpu() else time.process_time()


def wait_for_device() -> None:
    """Wait until the GPU has nothing left to do."""
    if on_gpu():
        torch.cuda.synchronize()


def without_patch(call: Callable[[], Any], optimizer: Any, scheduler: Any) -> Any:
    """Make a step with Megatron's own scheduler and the optimizer's own methods, and put ours back."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    ours = type(scheduler)
    kept = {name: vars(optimizer).pop(name) for name in ("step", "zero_grad") if name in vars(optimizer)}
    scheduler.__class__ = OptimizerParamScheduler
    try:
        return call()
    finally:
        scheduler.__class__ = ours
        vars(optimizer).update(kept)


Event = tuple[str, float, float, float]
"""Name, start and end in microseconds, time on the device."""


def syncs_by_step(events: Sequence[Event]) -> dict[int, int]:
    """Return how often the host waited within each step of a traced cycle, by its place."""
    names = ON_CUDA if any(name in ON_CUDA for name, *_ in events) else SYNCS
    found = {}
    for name, start, end, _ in events:
        if name.startswith("selfcheck step "):
            inside = sum(other in names and start <= begin <= end for other, begin, _, _ in events)
            found[int(name.rpartition(" ")[2])] = inside
    return found


def share_of_collectives(events: Iterable[Event]) -> float:
    """Return the part of the traced steps that collectives took."""
    steps = total = 0.0
    for name, start, end, device in events:
        if name.startswith("selfcheck step "):
            steps += end - start
        elif "nccl" in name.lower() and device:
            total += device
        elif name.startswith("gloo:"):
            total += end - start
    return total / steps if steps else 0.0


def longest(events: Iterable[Event], number: int = 12) -> list[str]:
    """Return the names of what took most of the time, kernels on a GPU and operators on a CPU."""
    events = list(events)
    on_device = any(device for *_, device in events)
    sums: dict[str, float] = {}
    for name, start, end, device in events:
        if not name.startswith(("selfcheck", "ProfilerStep")) and not (
            on_device and name.startswith(("aten::", "cuda"))
        ):
            sums[name] = sums.get(name, 0.0) + (device if on_device else end - start)
    return sorted(sums, key=lambda name: -sums[name])[:number]


def ratios(seconds: Sequence[tuple[int, float]]) -> dict[str, float]:
    """Return what the patch costs, in units of a step without it, from the times of steps by their place in the cycle.

    `on`: a step with the patch that measures nothing. `metrics`: a run that measures every tenth step. `spectral`: one
    that measures singular values as well. All are medians; the last two are of what a measured step and the one after
    it take beyond two others.
    """
    at: dict[int, list[float]] = {}
    for place, value in seconds:
        at.setdefault(place, []).append(value)
    median = {place: statistics.median(values) for place, values in at.items()}
    off = statistics.median(value for place, value in seconds if CYCLE[place] == "off")
    on = statistics.median(value for place, value in seconds if place in (2, 6))
    measured = median[3] + median[4] - 2 * on
    singular = median[7] + median[0] - 2 * on
    return {
        "on": on / off,
        "metrics": (on + measured / 10) / off,
        "spectral": (on + singular / 10) / off,
        "seconds": off,
    }


def added_syncs(by_step: Mapping[int, int]) -> dict[str, int]:
    """Return how many waits a measured step and the one after it have beyond two others."""
    plain = 2 * by_step[6]
    return {"metrics": by_step[3] + by_step[4] - plain, "spectral": by_step[7] + by_step[0] - plain}
