"""Which of a thousand lines says why a run failed: the first error that is not about another rank's end."""

import re
from dataclasses import dataclass

# pdsh puts the host before each line, torch the rank before each line of an exception that nobody catches.
_ORIGIN = re.compile(r"(?:(?P<host>[^\s:\[]+): )?(?:\[(?P<rank>rank\d+)\]: ?)?(?P<text>.*)")
_ERROR = re.compile(
    r"(?:error|refused): |(?:[A-Za-z_]\w*\.)*\w*(?:Error|Exception|Interrupt|Changed|Refuses)\b(?:: |$)"
)
_CODE = re.compile(r".*\bexits with return code = (-?\d+)")
_PDSH = re.compile(r"pdsh@\S+: (?P<host>\S+): ssh exited with exit code (?P<code>\d+)")
# What a rank says when another has left it. gloo's and NCCL's words; the other rank's own error is the one to read.
_PEER = re.compile(
    r"closed by peer|reset by peer|Timed out waiting|Broken pipe|remote process exited|ncclRemoteError|ncclSystemError"
    r"|Watchdog|DistBackendError|DistStoreError|DistNetworkError|Socket Timeout|clients joined|aborted"
    r"|Application timeout|unexpected pos .* vs|EADDRINUSE.*retry"
)
# Megatron trains on: an error so many of these lines ago was handled.
_PROGRESS = re.compile(r".*\biteration +\d+")
_HANDLED = 20
_SIGNALS = {4: "SIGILL", 6: "SIGABRT", 7: "SIGBUS", 8: "SIGFPE", 9: "SIGKILL", 11: "SIGSEGV", 15: "SIGTERM"}
# A process that another one ended in an orderly way, or that gave up because of another.
_SECONDARY_SIGNALS = {6, 15}


@dataclass(frozen=True)
class Finding:
    """What went wrong, and where."""

    host: str
    """Empty if it is not known."""
    text: str

    def __str__(self) -> str:
        return f"{self.host}: {self.text}" if self.host else self.text


class FirstError:
    """Reads what a run prints and remembers the first error; errors about other ranks come second.

    >>> errors = FirstError(["a", "b"])
    >>> for line in ["b: fine", "a: [rank0]: RuntimeError: Connection closed by peer", "b: ValueError: no such data"]:
    ...     errors.read(line)
    >>> print(errors.first)
    b: ValueError: no such data

    What only looks like an error says nothing about how the run ended; ask for it when it has failed.

    Args:
        hosts: the names that may stand before a line.
    """

    def __init__(self, hosts: list[str]) -> None:
        self._hosts = set(hosts)
        self.own: Finding | None = None
        """The first error that is not about another rank's end."""
        self.peer: Finding | None = None
        """The first one that is."""
        self._progress = 0
        self.certain = False
        """Something was found that ends a run, and not only read."""
        self.failed: list[tuple[str, int]] = []
        """Hosts whose command ended with a code other than 0, as pdsh tells it, and the code."""

    def read(self, line: str, host: str = "") -> None:
        """Take one line; `host` is whose, if it does not say so itself."""
        if ended := _PDSH.search(line):
            self.failed.append((ended["host"], int(ended["code"])))
            return
        found = _ORIGIN.fullmatch(line.rstrip("\r\n"))
        if found is None:
            return
        named, text = found["host"] or "", found["text"]
        if named not in self._hosts:
            named, text = "", f"{named}: {text}" if named else text
        host = named or host
        where = f"{found['rank'].replace('rank', 'rank ')}: " if found["rank"] else ""
        if code := _CODE.match(text):
            number = -int(code[1])
            if number > 0:
                name = _SIGNALS.get(number, f"signal {number}")
                hint = " (by the kernel, for lack of memory?)" if number == 9 else ""
                self._add(Finding(host, f"a rank was ended by {name}{hint}"), peer=number in _SECONDARY_SIGNALS)
        elif _PROGRESS.match(text):
            self._progress += 1
            if self._progress >= _HANDLED and not self.certain:
                self.own = self.peer = None
        elif _ERROR.match(text):
            self._progress = 0
            self._add(Finding(host, where + text.strip()[:500]), peer=bool(_PEER.search(text)))

    def certainly(self, finding: Finding, peer: bool = False) -> None:
        """Add what was not read but found, and ends a run."""
        self.certain = True
        self._add(finding, peer)

    def told(self, finding: Finding) -> None:
        """Add what was found and may yet be mended; see `forget`."""
        self._add(finding, peer=False)

    def _add(self, finding: Finding, peer: bool) -> None:
        """`peer`: it may well be about another rank's end."""
        if peer:
            self.peer = self.peer or finding
        else:
            self.own = self.own or finding

    def forget(self, host: str) -> None:
        """Take back what was found of a host: it was mended."""
        if self.own and self.own.host == host:
            self.own = None

    @property
    def first(self) -> Finding | None:
        """The first error; one about another rank's end only where there is no other."""
        return self.own or self.peer
