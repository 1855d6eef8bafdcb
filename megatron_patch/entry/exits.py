"""How a command ends: its exit code, and the line that says why; several, where there are several mistakes."""

import sys
from collections.abc import Callable

from megatron_patch.errors import ConfigErrors, ExitCode, MegatronPatchError, Refused


def exit_code(action: Callable[[], int | None], *, interrupted: str | None = None, speaks: bool = True) -> int:
    """Do `action` and return the exit code; a user's mistake becomes one line on stderr.

    Args:
        action: what the command does; what it returns is the exit code, None is 0.
        interrupted: what Ctrl-C has left behind, in words; without them it is passed on.
        speaks: whether this process prints that line; of the ranks of a run, one does.
    """
    try:
        return action() or ExitCode.DONE
    except Refused as error:
        code, line = ExitCode.REFUSED, f"refused: {error}"
    except MegatronPatchError as error:
        several = error.errors if isinstance(error, ConfigErrors) else (error,)
        code, line = ExitCode.MISTAKE, "\n".join(f"error: {one}" for one in several)
    except KeyboardInterrupt:
        if interrupted is None:
            raise
        code, line = ExitCode.INTERRUPTED, f"interrupted: {interrupted}"
    if speaks:
        print(line, file=sys.stderr, flush=True)
    return code
