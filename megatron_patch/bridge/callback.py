"""Where Bridge tells of its training: its public callbacks, handed on to the run that was set up."""

from typing import Any

from megatron.bridge.training.callbacks import Callback

from megatron_patch.bridge.run import BridgeRun
from megatron_patch.errors import AuditError
from megatron_patch.files.run_json import TEST, VALIDATION


class TransferCallback(Callback):  # type: ignore[misc]
    """Audits the run after the load, measures it, and keeps run.json; returned by `megatron_patch.bridge.apply`."""

    def on_train_start(self, context: Any) -> None:
        """Everything is built and loaded.

        Raises:
            AuditError: the optimizer does not hold the plan.
            ConfigError: a folder that cannot be written to; no layer matches --alignment-layers.
        """
        state = context.state
        _run(context).begin(
            context.model,
            context.optimizer,
            context.scheduler,
            state.train_state.step,
            (state.tensorboard_logger, state.wandb_logger),
        )

    def on_train_step_start(self, context: Any) -> None:
        """Before the forward pass."""
        _run(context).begin_step(context.state.train_state.step)

    def on_train_step_end(self, context: Any) -> None:
        """After the optimizer's and the scheduler's step; Bridge counts it only then."""
        _run(context).end_step(context.state.train_state.step + 1, context.loss_dict or {}, context.scheduler)

    def on_eval_end(self, context: Any) -> None:
        """After an evaluation on the validation set."""
        self._evaluated(VALIDATION, context)

    def on_test_end(self, context: Any) -> None:
        """After an evaluation on the test set."""
        self._evaluated(TEST, context)

    def on_train_end(self, context: Any) -> None:
        """The training loop is through."""
        _run(context).end()

    def _evaluated(self, on: str, context: Any) -> None:
        _run(context).evaluated(on, context.state.train_state.step, context.total_loss_dict or {})


def _run(context: Any) -> BridgeRun:
    run = getattr(context.state.cfg.optimizer_config_override_provider, "run", None)
    if not isinstance(run, BridgeRun):
        raise AuditError(
            "megatron_patch's callback has a config without its provider: give pretrain both the config and the "
            "callbacks that megatron_patch.bridge.apply returned"
        )
    return run
