"""`megatron_patch.install()`: the patch for scripts that install it themselves."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, ClassVar

from megatron_patch.errors import ConfigError, MegatronPatchError


class Patch:
    """The hooks in this process: those that add the flags, and those the flags ask for once they are known.

    Also a context manager. Arguments and errors are those of `megatron_patch.install`.
    """

    _live: ClassVar["Patch | None"] = None

    def __init__(self, *, cpu: bool = False, allow_untested_megatron: bool = False) -> None:
        if Patch._live is not None:
            raise MegatronPatchError(
                "megatron_patch is installed already in this process: call remove() of the handle that install() "
                "returned, or megatron_patch.uninstall(), before installing it again"
            )
        from megatron_patch.upstream.cpu import platform as cpu_platform

        self._platform = None
        self._told = False
        if (cpu or "--cpu" in sys.argv[1:]) and not cpu_platform.is_active():
            self._platform = cpu_platform.activate()
        self._session: Any = None
        try:
            # Only now: the CPU platform must be up before Megatron is imported.
            from megatron_patch.upstream.hooks import check_version
            from megatron_patch.upstream.patch import Session

            check_version(allow_untested_megatron or "--allow-untested-megatron" in sys.argv[1:])
            self._session = Session()
            self._session.begin(self._prepare)
        except BaseException:
            self._deactivate()
            raise
        Patch._live = self

    @staticmethod
    def installed() -> "Patch":
        """Return the one that is installed.

        Raises:
            MegatronPatchError: there is none.
        """
        if Patch._live is None:
            raise MegatronPatchError("megatron_patch is not installed in this process: there is nothing to undo")
        return Patch._live

    def remove(self) -> None:
        """Restore everything that was replaced in Megatron, and torch's CUDA functions if they were. Twice is harmless.

        An optimizer, scheduler or model that was built in the meantime stays what it is.

        Raises:
            UpstreamChanged: somebody replaced one of our replacements; nothing is restored then.
        """
        if self._session is not None:
            self._session.remove()
        self._deactivate()
        if Patch._live is self:
            Patch._live = None

    def _deactivate(self) -> None:
        if self._platform is not None:
            self._platform.deactivate()
            self._platform = None

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def _prepare(self, parser: argparse.ArgumentParser) -> None:
        """Let a parser of Megatron's see the command line that `run` would give it."""
        from megatron_patch.upstream.hooks import refuse_other_megatron

        refuse_other_megatron()
        original = parser.parse_known_args  # parse_args calls it as well

        def parse_known_args(args: Any = None, namespace: Any = None) -> Any:
            return original(self._words(sys.argv[1:] if args is None else args), namespace)

        parser.parse_known_args = parse_known_args  # type: ignore[method-assign]

    def _words(self, words: Sequence[str]) -> list[str]:
        from megatron_patch.upstream.cpu import platform as cpu_platform
        from megatron_patch.upstream.flags import refuse_yaml_cfg

        refuse_yaml_cfg(words)
        if not cpu_platform.is_active():
            if "--cpu" in words:
                raise ConfigError(
                    "--cpu",
                    "given",
                    "the CPU platform switched on before Megatron is imported",
                    "call megatron_patch.install(cpu=True)",
                )
            return list(words)
        extended, said = cpu_platform.cpu_arguments(words)
        if not self._told and int(os.environ.get("RANK", "0")) == 0:
            print(*said, sep="\n", flush=True)
        self._told = True
        return extended if "--cpu" in extended else [*extended, "--cpu"]
