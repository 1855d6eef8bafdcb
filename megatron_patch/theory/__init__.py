"""Equations of width transfer as functions of plain numbers; imports the standard library and nothing else.

The public face: every name below, so that `from megatron_patch.theory import exp_increasing` works. Inside the package
import from the modules. `alignment` stays the module: its function of that name would hide it.
"""

from megatron_patch.theory.alignment import (
    alignment_ratio,
    critical_batch_size,
    noise_model_update_alignment,
    noise_model_update_alignment_approximate,
    relative_representation_change,
    relative_update,
)
from megatron_patch.theory.deviation import (
    Trained,
    likely_cause,
)
from megatron_patch.theory.equilibrium import (
    NormStep,
    decay_per_step,
    ema_time_scale,
    equilibrium_norm,
    equilibrium_relative_update,
    equilibrium_rho,
    momentum_update_rms,
    next_rho,
    relative_update_without_decay,
    rho_after,
    steps_to_equilibrium,
    top_singular_value_scale,
    trajectory,
    trajectory_of_stretches,
)
from megatron_patch.theory.schedules import (
    decay_away,
    decay_away_factors,
    decay_away_step,
    equilibrium_factor,
    equilibrium_factors,
    exp_increasing,
    linear_warmup_linear_decay,
    warmup_length,
)
from megatron_patch.theory.transfer import (
    BATCH_RULES,
    BatchRule,
    batch_lr_factor,
    depth_lr_factor,
    depth_residual_factor,
    weight_decay_factor,
)
from megatron_patch.theory.width import (
    ROLES,
    RULES,
    Multipliers,
    ParamSpec,
    Role,
    Rule,
    multipliers,
    rule,
)

__all__ = [
    "BATCH_RULES",
    "ROLES",
    "RULES",
    "BatchRule",
    "Multipliers",
    "NormStep",
    "ParamSpec",
    "Role",
    "Rule",
    "Trained",
    "alignment_ratio",
    "batch_lr_factor",
    "critical_batch_size",
    "decay_away",
    "decay_away_factors",
    "decay_away_step",
    "decay_per_step",
    "depth_lr_factor",
    "depth_residual_factor",
    "ema_time_scale",
    "equilibrium_factor",
    "equilibrium_factors",
    "equilibrium_norm",
    "equilibrium_relative_update",
    "equilibrium_rho",
    "exp_increasing",
    "likely_cause",
    "linear_warmup_linear_decay",
    "momentum_update_rms",
    "multipliers",
    "next_rho",
    "noise_model_update_alignment",
    "noise_model_update_alignment_approximate",
    "relative_representation_change",
    "relative_update",
    "relative_update_without_decay",
    "rho_after",
    "rule",
    "steps_to_equilibrium",
    "top_singular_value_scale",
    "trajectory",
    "trajectory_of_stretches",
    "warmup_length",
    "weight_decay_factor",
]
