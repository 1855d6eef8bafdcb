"""What a finished training left behind for whoever started its script."""


def measured_folder() -> str | None:
    """Return the metrics folder of the training that this process has done.

    None if nothing was measured, on all ranks but the last, which keeps run.json, under --no-report, and if the script
    did not get as far as parsing its arguments.
    """
    from megatron.training.global_vars import get_args

    from megatron_patch.upstream.flags import settings_from_args

    try:
        args = get_args()
    except AssertionError:  # Megatron's way to say that there are none
        return None
    metrics = settings_from_args(args).metrics
    if not metrics.active or args.rank != args.world_size - 1 or getattr(args, "no_report", False):
        return None
    return metrics.directory
