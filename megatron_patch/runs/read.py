"""The trials of a sweep, from whatever it left: run.json, a CSV, TensorBoard or W&B."""

import os

from megatron_patch.errors import ConfigError
from megatron_patch.files.run_json import RUN_JSON, RunJson
from megatron_patch.runs.trial import Trial, read_csv, trial_of_run


def read_trials(path: str) -> tuple[Trial, ...]:
    """Return the trials in a CSV file, or of every run in or below a folder.

    Runs of this project are known by their run.json. A folder without one may hold TensorBoard event folders or W&B
    offline runs of Megatron (see `megatron_patch.runs.foreign`).

    Raises:
        ConfigError: nothing there, or a file that cannot be read.
    """
    if os.path.isfile(path):
        return read_csv(path)
    if not os.path.isdir(path):
        raise ConfigError(path, "", "a folder of runs or a CSV file", "check the path (there is no such file)")
    from megatron_patch.runs.foreign import read_foreign_runs
    from megatron_patch.runs.run import find_runs

    try:
        folders = find_runs(path)
    except ConfigError:
        return read_foreign_runs(path)
    trials = []
    for folder in folders:
        file = os.path.join(folder, RUN_JSON)
        try:
            run = RunJson.read(file)
        except (OSError, ValueError) as error:
            raise ConfigError(file, f"({error})", "a run.json", "restore it, or leave this run out") from None
        trials.append(trial_of_run(run))
    return tuple(trials)
