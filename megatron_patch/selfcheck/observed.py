"""An ordinary Megatron script for ``megatron-patch run``: trains as the script it is told to run, and is watched.

What to watch and where to write it is in the JSON file that the variable `SPEC` names.
"""

import json
import os
import runpy

SPEC = "MEGATRON_PATCH_SELFCHECK"


def main() -> None:
    """Watch, and train."""
    with open(os.environ[SPEC], encoding="utf-8") as file:
        spec = json.load(file)
    from megatron_patch.selfcheck.watch import begin

    begin(spec)
    runpy.run_path(spec["script"], run_name="__main__")


if __name__ == "__main__":
    main()
