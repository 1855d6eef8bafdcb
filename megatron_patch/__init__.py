"""Layer-wise learning-rate and weight-decay transfer across width for NVIDIA Megatron, without touching its source.

In code, for a script of your own that calls Megatron's `pretrain` (`python -m megatron_patch run` needs none of this):

    import megatron_patch

    with megatron_patch.install():
        args = parse_and_validate_args()
        pretrain(...)

Importing this package imports nothing of Megatron or torch; `install` does.
"""

from typing import TYPE_CHECKING

from megatron_patch.version import __version__

if TYPE_CHECKING:
    from megatron_patch.entry.install import Patch

__all__ = ["__version__", "install", "uninstall"]


def install(*, cpu: bool = False, allow_untested_megatron: bool = False) -> "Patch":
    """Put our flags into Megatron's parser, and make what they ask for happen in the training that follows.

    To be called before Megatron parses its arguments. Where `run` prints one line and ends the process, this raises.

    Args:
        cpu: run on CPU, as --cpu on the command line also asks for; best before torch is imported.
        allow_untested_megatron: try a version of Megatron that this package was not tested with.

    Returns:
        A handle: `remove()` undoes everything; as a context manager it does so at the end of the block.

    Raises:
        MegatronPatchError: installed already; as `UpstreamChanged`, a Megatron that cannot be hooked; as `ConfigError`,
            a CPU platform where CUDA is present. Later, from Megatron's own functions: `ConfigError` for flags that
            cannot be honoured, `AuditError` for an optimizer that does not hold what was asked for.
    """
    from megatron_patch.entry.install import Patch

    return Patch(cpu=cpu, allow_untested_megatron=allow_untested_megatron)


def uninstall() -> None:
    """Undo `install`, for those who have not kept its handle.

    Raises:
        MegatronPatchError: nothing is installed; as `UpstreamChanged`, somebody has hooked Megatron on top of us.
    """
    from megatron_patch.entry.install import Patch

    Patch.installed().remove()
