"""Our flags as values that know what contradicts what.

Each is a field of a dataclass, with its type, choices, default and help. The parser (`OPTIONS`) and the reader
(`Settings.of`) follow from the fields, so a new flag is a new field.
"""

from megatron_patch.config.engine import EngineConfig
from megatron_patch.config.metrics import MetricsConfig
from megatron_patch.config.options import Option, flag, options_of
from megatron_patch.config.settings import OPTIONS, Settings
from megatron_patch.config.warmup import SCOPES, WARMUPS, WarmupConfig
from megatron_patch.config.width import BASE_DIMENSIONS, INIT_SCALINGS, WIDTH_RULES, WidthConfig

__all__ = [
    "BASE_DIMENSIONS",
    "INIT_SCALINGS",
    "OPTIONS",
    "SCOPES",
    "WARMUPS",
    "WIDTH_RULES",
    "EngineConfig",
    "MetricsConfig",
    "Option",
    "Settings",
    "WarmupConfig",
    "WidthConfig",
    "flag",
    "options_of",
]
