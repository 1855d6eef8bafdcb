"""Work beside the training's own on a GPU: a stream of its own, and results that reach the host without waiting."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

TO_HOST = "megatron_patch::to_host"
"""What the one wait of a measured step is called in a profile."""


class Beside:
    """A stream beside the current one of a device; on a CPU everything happens in order, at once.

    Args:
        device: where the tensors are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None

    @contextmanager
    def work(self, reads: Iterable[Tensor] = ()) -> Iterator[None]:
        """Do what is within after all that was asked of the current stream so far, and let that stream go on.

        Args:
            reads: tensors from the current stream that are used within, and may be let go of before it is done; on a
                CPU nobody looks at them.
        """
        if self._device.type != "cuda":
            yield
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        for tensor in reads:
            # Else the allocator would give their memory away as soon as the current stream is through with them.
            tensor.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            yield


class OnItsWay:
    """A tensor on its way to the host; build it in the stream that makes the tensor.

    Args:
        tensor: any; it must not change any more.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._source = tensor
        self._event: torch.cuda.Event | None = None
        if tensor.is_cuda:
            # Only a copy into pinned memory goes on behind the host's back.
            self._host = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()
        else:
            self._host = tensor

    def arrived(self) -> Tensor:
        """Return it on the host; waits for it, and only for it, if need be."""
        with torch.profiler.record_function(TO_HOST):
            if self._event is not None:
                self._event.synchronize()
        return self._host
