"""Bridge's public door to the param groups, over the plan and the audit of the Megatron path."""

import copy
from dataclasses import dataclass, field
from typing import Any

from megatron.bridge.training.config import OptimizerConfigOverrideProvider

from megatron_patch.bridge.arguments import mistakes, namespace
from megatron_patch.bridge.doors import open_doors
from megatron_patch.bridge.run import BridgeRun
from megatron_patch.errors import ConfigError, raise_together
from megatron_patch.upstream.width.plan import config_overrides


@dataclass
class WidthScalingProvider(OptimizerConfigOverrideProvider):  # type: ignore[misc]
    """Gives every parameter its LR, weight decay and eps when Bridge builds the optimizer.

    Made by `megatron_patch.bridge.apply`. Its fields are saved with the run's config.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    """Ours, by the flags' names."""
    inner: OptimizerConfigOverrideProvider = field(default_factory=OptimizerConfigOverrideProvider)
    """The recipe's own, whose overrides ours are added to."""

    # No fields: Bridge saves those, and calls __post_init__ of its config's parts more than once.
    _cfg = None
    run = None
    """The `BridgeRun` that was set up last."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "WidthScalingProvider":
        """A copy is of no config until `apply` is called on that."""
        return WidthScalingProvider(copy.deepcopy(self.settings, memo), copy.deepcopy(self.inner, memo))

    def attach(self, cfg: Any) -> None:
        """Tell it the ConfigContainer that it is part of."""
        self._cfg = cfg

    def build_config_overrides(self, context: Any) -> dict[Any, Any]:
        """Plan every parameter of this rank; a collective call.

        Args:
            context: Bridge's: scheduler_config, optimizer_config, model.

        Returns:
            The overrides of the recipe's own provider, and those of the rule.

        Raises:
            AuditError: on all ranks, if the rule scales nothing.
            ConfigError: what `apply` raises, for a config that was changed since; ranks that differ.
            UpstreamChanged: Bridge has no longer what is needed of it.
        """
        if self._cfg is None or self._cfg.optimizer_config_override_provider is not self:
            raise ConfigError(
                "optimizer_config_override_provider",
                "WidthScalingProvider",
                "one that megatron_patch.bridge.apply has put into this config",
                "call megatron_patch.bridge.apply(cfg, ...) on the config that is trained",
            )
        raise_together(mistakes(self._cfg, self.settings))
        model = context.model if isinstance(context.model, list) else [context.model]
        self.run = BridgeRun(namespace(self._cfg, self.settings), context.optimizer_config, model)
        open_doors(self.run.make_scheduler, self.run.check_checkpoint)
        return {**(self.inner.build_config_overrides(context) or {}), **config_overrides(self.run.plan)}
