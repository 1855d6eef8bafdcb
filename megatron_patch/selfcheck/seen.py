"""What a rank has seen of its run, on its way to the process that judges."""

from collections.abc import Mapping
from typing import Any

import torch

from megatron_patch.files.whole import write_json


def save(spec: Mapping[str, Any], content: Mapping[str, Any]) -> None:
    """Write what this rank has seen into its file beside ``spec["result"]``.

    Raises:
        OSError: it cannot be written.
    """
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    write_json(f"{spec['result']}.{rank}.json", content)
