"""What `apply` says of several configs: python -m tests.bridge.refusing '[{"settings": {...}}, ...]'."""

import json
import os
import sys
from typing import Any

from tests.bridge.training import ready, recipe


def said(options: dict[str, Any]) -> dict[str, Any]:
    """Return the error of `apply`, or none, and whether the config was left as it was."""
    import megatron_patch.bridge
    from megatron_patch.errors import MegatronPatchError

    cfg = recipe(**options)
    if options.get("peft"):
        from megatron.bridge.peft.lora import LoRA

        cfg.peft = LoRA()
    if options.get("no_decay"):
        cfg.scheduler.start_weight_decay = cfg.scheduler.end_weight_decay = None
    if options.get("without_door"):
        import megatron.bridge.training.optim as optim

        optim.OptimizerParamScheduler = type("Other", (), {})  # type: ignore[attr-defined]
    before, error, callbacks = cfg.optimizer_config_override_provider, None, []
    try:
        _, callbacks = megatron_patch.bridge.apply(cfg, **options["settings"])
    except MegatronPatchError as refused:
        error = [type(refused).__name__, str(refused)]
    same = cfg.optimizer_config_override_provider is before
    return {"error": error, "unchanged": same, "callbacks": len(callbacks)}


if __name__ == "__main__":
    ready()
    told = [said(options) for options in json.loads(sys.argv[1])]
    print(json.dumps(told), flush=True)
    os._exit(0)
