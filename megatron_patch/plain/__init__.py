"""The same rules, warmups, audit and metrics for any torch model, alone, under DDP, FSDP2 or DeepSpeed's ZeRO.

Nothing here imports Megatron; DeepSpeed and transformers are recognised, and imported only by who uses them.
"""

from megatron_patch.plain.audit import Audited, audit
from megatron_patch.plain.groups import summary, width_groups
from megatron_patch.plain.meter import AlignmentMeter, Measured
from megatron_patch.plain.warmup import ExtraWarmup

__all__ = ["AlignmentMeter", "Audited", "ExtraWarmup", "Measured", "audit", "summary", "width_groups"]
