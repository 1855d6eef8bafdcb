"""TensorBoard event files of a run: finding them and reading what a report shows."""

import glob
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_patch.files.run_json import LOSS, METRICS_FOLDER

TAGS = (LOSS, "learning-rate", "grad-norm")
"""Keys that are read, beside those of the parameter classes.

The validation loss is not among them: Megatron logs the loss on the test set under the same key. run.json has both.
"""
CLASS_TAGS = ("lr/", "weight_decay/")


@dataclass(frozen=True)
class Series:
    """A number over iterations, which only ever rise."""

    iterations: tuple[int, ...] = ()
    values: tuple[float, ...] = ()


def tensorboard_files(folder: str, arguments: Mapping[str, Any]) -> list[str]:
    """Return the event files of a run in the order in which they were begun.

    The paths in run.json are as the user typed them: relative to a folder that nothing records, or on the machine of
    the training. So the way from the metrics folder to the TensorBoard folder is tried first.

    Args:
        folder: the metrics folder, where it is now.
        arguments: Megatron's arguments in run.json.
    """
    recorded = arguments.get("tensorboard_dir")
    if not recorded:
        return []
    metrics = arguments.get("metrics_dir") or os.path.join(arguments.get("save") or recorded, METRICS_FOLDER)
    candidates = [recorded]
    if os.path.isabs(metrics) == os.path.isabs(recorded):
        candidates.insert(0, os.path.join(folder, os.path.relpath(recorded, metrics)))
    for candidate in candidates:
        # The name holds the time of making: events.out.tfevents.1795315071.host.24911.0
        files = sorted(glob.glob(os.path.join(glob.escape(candidate), "events.out.tfevents.*")))
        if files:
            return files
    return []


def read_events(paths: Sequence[str]) -> dict[str, Series]:
    """Return the scalars of TensorBoard event files, in the order of the files.

    A step that is not above the one before begins a resumed run: it replaces what an earlier start logged from there
    on. A file ends at its first unfinished or damaged record.
    """
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    points: dict[str, list[tuple[int, float]]] = {}
    for path in paths:
        for event in LegacyEventFileLoader(path).Load():
            for value in event.summary.value:
                wanted = value.tag in TAGS or value.tag.startswith(CLASS_TAGS)
                # Megatron logs its flags as texts: --lr is lr/text_summary.
                if not wanted or value.WhichOneof("value") != "simple_value":
                    continue
                known = points.setdefault(value.tag, [])
                while known and known[-1][0] >= event.step:
                    known.pop()
                known.append((event.step, value.simple_value))
    return {
        tag: Series(tuple(step for step, _ in known), tuple(number for _, number in known))
        for tag, known in points.items()
    }
