"""Which optimizer trains the matrices, as the rules see it: Megatron's flags, read and never set."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_patch.theory.updates import UpdateScale

EMERGING = ("muon", "soap", "lion")
"""Megatron's optimizers, beside adam, whose update is known to the rules (package emerging-optimizers)."""
SHARD_BY_SHARD = ("muon", "soap")
"""Those whose update of a matrix is not made entry by entry, so that it may depend on how the matrix is split."""


@dataclass(frozen=True)
class OptimizerChoice:
    """Megatron's --optimizer with what else decides the size of its update."""

    name: str = "adam"
    muon_scale: UpdateScale = "spectral"
    scalars: str = "adam"
    """What trains embeddings, LM head and vectors beside muon (--muon-scalar-optimizer)."""

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "OptimizerChoice":
        """Read Megatron's flags by attribute name; what is absent has Megatron's default."""
        name = str(arguments.get("optimizer") or "adam").removeprefix("dist_")
        return cls(
            name,
            arguments.get("muon_scale_mode") or "spectral",
            (arguments.get("muon_scalar_optimizer") or "adam") if name == "muon" else "adam",
        )

    def scale_of(self, optimizer: str) -> UpdateScale:
        """Return how one of the run's optimizers scales updates: `name` itself, or what trains the rest beside it."""
        return self.muon_scale if optimizer == "muon" else "entrywise"

    @property
    def of_matrices(self) -> UpdateScale:
        """How updates of matrices in the layers are scaled."""
        return self.scale_of(self.name)
