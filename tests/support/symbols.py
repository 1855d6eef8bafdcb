"""Everything that the loaded modules hold, to tell what a patch replaced."""

import inspect
import sys
from typing import Any

ENTRY = {
    "megatron.training.arguments:add_megatron_arguments",
    "megatron.training.arguments:validate_args",
    "megatron.core.datasets.utils:compile_helpers",
    "megatron.training.checkpointing:load_args_from_checkpoint",
}


def symbols() -> dict[str, Any]:
    """Every function, class and method that any loaded module holds, ours and the tests' left out."""
    found = {}
    for name, module in list(sys.modules.items()):
        if module is None or name.partition(".")[0] in ("megatron_patch", "tests", "__main__"):
            continue
        for attribute, value in list(getattr(module, "__dict__", {}).items()):
            if callable(value):
                found[f"{name}:{attribute}"] = value
            if inspect.isclass(value) and value.__module__ == name and name.startswith("megatron."):
                found.update({f"{name}:{attribute}.{member}": method for member, method in list(vars(value).items())})
    return found
