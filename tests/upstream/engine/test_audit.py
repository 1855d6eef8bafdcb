"""The audit reads the engine's live groups: at the start, and every --audit-interval iterations, on every rank."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.engine import RUN, Watched, ds_json
from tests.support.pool import Pool, RankFailure
from tests.support.training import Run, train

STEPS = 4


def failure(pool: Pool, ranks: int, argv: list[str], hooks: Watched) -> str:
    with pytest.raises(RankFailure) as caught:
        pool.run(train, ranks=ranks, argv=argv, steps=STEPS, hooks=hooks)
    return "\n".join(caught.value.errors.values())


@dataclass
class Tampered(Watched):
    """Changes a value of the live group of embeddings after the second step, on one rank alone."""

    key: str = "lr"
    back_end: str = "engine"

    def stepped(self, run: Run, iteration: int, losses: dict[str, float]) -> None:
        import torch

        if iteration == 2 and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            if self.back_end == "engine":
                groups = run.optimizer.engine.optimizer.param_groups
            else:
                groups = run.optimizer.param_groups
            group = next(g for g in groups if g["max_lr"] == 0.02 and g["wd_mult"])
            group[self.key] = group[self.key] * (1 + 1e-6)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("key", ["weight_decay", "eps"])
def test_a_group_that_was_changed_stops_the_run(pool: Pool, tmp_path: Path, stage: int, key: str) -> None:
    argv = [*RUN, *ds_json(tmp_path, stage), "--audit-interval", "1"]
    said = failure(pool, 2, argv, Tampered(key=key))
    found = re.findall(rf"AuditError: (rank 1 on \S+): embedding\.\w+\.weight: the optimizer has {key} = ", said)
    assert len(found) == 2, said  # the same on both ranks, which names the one that is wrong


def test_the_interval_is_kept_and_0_never_looks(pool: Pool, tmp_path: Path) -> None:
    for interval in ("0", "5"):
        argv = [*RUN, *ds_json(tmp_path, 1), "--audit-interval", interval]
        pool.run(train, ranks=2, argv=argv, steps=STEPS, hooks=Tampered(key="eps"))


def test_megatrons_optimizer_is_audited_as_often(pool: Pool) -> None:
    argv = [*RUN, "--audit-interval", "1"]
    said = failure(pool, 2, argv, Tampered(key="eps", back_end="megatron"))
    assert re.search(r"AuditError: rank 1 on \S+: embedding\.", said)


@dataclass
class Moved(Watched):
    """Lets DeepSpeed's own list of what is in which group be another than the optimizer's."""

    stage: int = 1
    dropped: bool = False

    def before_arguments(self) -> None:
        import deepspeed

        original = deepspeed.initialize

        def initialize(*args: Any, **kwargs: Any) -> Any:
            found = original(*args, **kwargs)
            zero = found[0].optimizer
            if self.stage == 3:
                groups = zero.fp16_groups
            else:
                groups = zero.bit16_groups
            moved = groups[-1].pop()
            if not self.dropped:
                groups[0].append(moved)
            return found

        deepspeed.initialize = initialize
        super().before_arguments()


@pytest.mark.parametrize("stage", [1, 3])
def test_a_parameter_in_a_group_of_another_class_is_found_at_the_start(pool: Pool, tmp_path: Path, stage: int) -> None:
    """The audit asks the engine who is in a group, and does not remember it from before the engine was built."""
    said = failure(pool, 1, [*RUN, *ds_json(tmp_path, stage)], Moved(stage=stage))
    assert "AuditError: " in said
    assert "the optimizer has " in said


def test_a_parameter_in_no_group_is_found_although_zero_3_has_taken_it_away(pool: Pool, tmp_path: Path) -> None:
    """Nothing of it is in its place between uses, as of a shard that FSDP gives to other ranks."""
    said = failure(pool, 1, [*RUN, *ds_json(tmp_path, 3)], Moved(stage=3, dropped=True))
    assert re.search(r"AuditError: .* is in no param group: the optimizer does not train it", said), said


@dataclass
class Replaced(Watched):
    """Lets a group train another tensor than the flat one of its parameters."""

    def built(self, run: Run) -> None:
        import torch

        group = run.optimizer.param_groups[0]
        group["params"] = [torch.zeros_like(group["params"][0])]
        super().built(run)


def test_a_group_that_trains_another_tensor_is_found(pool: Pool, tmp_path: Path) -> None:
    said = failure(pool, 1, [*RUN, *ds_json(tmp_path, 1)], Replaced())
    assert "AuditError: param group 0 of the engine trains 1 tensors, but not the flat one that ZeRO keeps" in said


def test_the_table_of_hyperparameters_is_megatrons(pool: Pool, tmp_path: Path) -> None:
    """hyperparameters.json is read from the engine's groups, and says what it says of Megatron's."""
    import json

    tables = []
    for name, flags in (("megatron", []), ("engine", ds_json(tmp_path, 3))):
        folder = tmp_path / name
        argv = [*RUN, *flags, "--metrics-dir", str(folder), "--eval-iters", "2", "--eval-interval", "2"]
        pool.run(train, ranks=2, argv=argv, steps=STEPS, hooks=Watched())
        run = json.loads((folder / "run.json").read_text())
        assert run["status"] == "finished"
        evaluations = list(run["evaluations"])
        tables.append((json.loads((folder / "hyperparameters.json").read_text()), evaluations, run["final_loss"]))
    (theirs, evaluated, final), (ours, also_evaluated, also_final) = tables
    assert ours == theirs
    assert len(evaluated) >= 2
    assert len(also_evaluated) == len(evaluated)
    assert also_final == pytest.approx(final, abs=1e-6)
