"""Files that appear under their own names only when they are complete."""

import fcntl
import os
from collections.abc import Sequence
from types import TracebackType

from megatron_patch.errors import ConfigError

SUFFIX = ".partial"


class OutputFiles:
    """A set of files that is written under ``<name>.partial`` and renamed as a whole at the end.

    Leaving the `with` block without `publish` removes the partial files. A killed process cannot do that; its leftovers
    have the same names, so the next run with the same output takes them over. A lock on the first partial file keeps a
    second run away from the same output; the system drops it with the process.

    Args:
        paths: the final names, in the order of renaming: the one that makes the set valid (``.idx``) comes last.
        overwrite: replace files that exist under these names, but only in `publish`.

    Raises (on entering):
        ConfigError: a file exists and `overwrite` is off, another run writes the same files, or the folder cannot be
            written to.
    """

    def __init__(self, paths: Sequence[str], overwrite: bool = False) -> None:
        self.paths = tuple(paths)
        self.overwrite = overwrite

    @staticmethod
    def temporary(path: str) -> str:
        """Return the name under which `path` is written."""
        return path + SUFFIX

    def __enter__(self) -> "OutputFiles":
        first = self.temporary(self.paths[0])
        folder = os.path.dirname(os.path.abspath(first))
        try:
            os.makedirs(folder, exist_ok=True)
            self._lock = open(first, "ab")
        except OSError as error:
            raise ConfigError(
                "--output-prefix",
                self.paths[0],
                "a folder that can be written to",
                f"choose another ({error.strerror})",
            ) from None
        try:
            self._take_lock(first)
        except BaseException:
            self._lock.close()  # and leave the partial files: they are the other run's
            raise
        try:
            existing = [path for path in self.paths if os.path.lexists(path)]
            if existing and not self.overwrite:
                raise ConfigError(
                    "--output-prefix", existing[0], "a name that is not in use", "choose another or add --overwrite"
                )
        except BaseException:
            self._remove_temporaries()
            raise
        return self

    def _take_lock(self, first: str) -> None:
        busy = ConfigError("--output-prefix", self.paths[0], "no other run with the same output", "wait for it to end")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        except OSError:
            return  # a file system without locks: two runs with one output are then the user's to avoid
        # The other run may have renamed the file between our open and our lock.
        if not os.path.exists(first) or not os.path.samestat(os.fstat(self._lock.fileno()), os.stat(first)):
            raise busy

    def publish(self) -> None:
        """Flush every partial file to disk and give it its final name, in the order of `paths`.

        An interruption on the way removes what was already renamed, so that no half of the set remains.
        """
        for path in self.paths:
            with open(self.temporary(path), "rb") as file:
                os.fsync(file.fileno())
        # Old files go from the last to the second, so that no old index ever stands beside new data.
        for path in reversed(self.paths[1:]):
            if os.path.lexists(path):
                os.remove(path)
        published: list[str] = []
        try:
            for path in self.paths:
                os.replace(self.temporary(path), path)
                published.append(path)
        except BaseException:
            for path in published:
                os.remove(path)
            raise

    def _remove_temporaries(self) -> None:
        for path in self.paths:
            if os.path.exists(self.temporary(path)):
                os.remove(self.temporary(path))
        self._lock.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._remove_temporaries()
