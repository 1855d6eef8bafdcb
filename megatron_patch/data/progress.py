"""How far a long run over documents has come: a bar on a terminal, plain lines in a log."""

import sys
import time
from types import TracebackType


class Progress:
    """Shows documents, tokens and their rates on stderr while a `with` block runs.

    Args:
        title: what is being done, e.g. ``"tokenizing"``.
        total_documents: how many there will be, if that is known beforehand.
        interval_seconds: time between two lines of a log.
    """

    def __init__(self, title: str, total_documents: int | None = None, interval_seconds: float = 5.0) -> None:
        self.title = title
        self.total_documents = total_documents
        self.interval_seconds = interval_seconds
        self.documents = 0
        self.tokens = 0

    def __enter__(self) -> "Progress":
        self._start = self._last_line = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[rates]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total_documents, rates="")
        return self

    @property
    def seconds(self) -> float:
        """Time since the block was entered."""
        return time.monotonic() - self._start

    def advance(self, documents: int, tokens: int = 0) -> None:
        """Count `documents` more documents, with `tokens` more tokens."""
        self.documents += documents
        self.tokens += tokens
        if self._bar is not None:
            self._bar.update(self._task, completed=self.documents, rates=self._rates())
        elif time.monotonic() - self._last_line >= self.interval_seconds:
            self._last_line = time.monotonic()
            of_total = "" if self.total_documents is None else f" of {self.total_documents}"
            print(f"{self.title}: {self.documents}{of_total} documents, {self._rates()}", file=sys.stderr, flush=True)

    def _rates(self) -> str:
        seconds = max(self.seconds, 1e-9)
        tokens = f", {self.tokens / seconds:,.0f} tokens/s" if self.tokens else ""
        return f"{self.documents / seconds:,.0f} documents/s{tokens}"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
