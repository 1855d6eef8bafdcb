"""What is coming in Megatron and would make a hook of this package superfluous or wrong; a test tells when it is there.

At the installed release and, by `make test-next`, at a checkout of main.
"""

import ast
from pathlib import Path
from typing import Any

import pytest

from megatron_patch.upstream.width.groups import IDENTIFIER_KEYS
from tests.support.building import Builder
from tests.support.observed import ObservedWithPatch
from tests.support.param_groups import CASES, argv
from tests.support.pool import Pool
from tests.support.training import TINY, train


def upstream_names() -> set[str]:
    """In a worker: the classes and functions of core.optimizer and megatron.training, and the modules of core."""
    import megatron.core
    import megatron.training

    core, training = (Path(module.__path__[0]) for module in (megatron.core, megatron.training))
    names = {path.stem for path in core.iterdir()}
    for path in [*(core / "optimizer").rglob("*.py"), *training.rglob("*.py")]:
        defined = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        names |= {node.name for node in defined if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    return names


@pytest.fixture(scope="module")
def names(pool: Pool) -> set[str]:
    found: set[str] = pool.run(upstream_names, distributed=False)[0]
    assert {"get_megatron_optimizer", "setup_model_and_optimizer", "optimizer"} <= found
    return found


def test_there_is_no_override_provider_in_core_yet(names: set[str]) -> None:
    """PR 5238. When this fails: `feature_hooks` need not wrap `get_megatron_optimizer` to hand over `config_overrides`;
    make the plan in a provider, and keep the audit in `setup_model_and_optimizer`."""
    assert not [name for name in names if "OverrideProvider" in name]


def test_mup_is_where_it_was(names: set[str]) -> None:
    """PR 4829. When this fails: reread `_override` in upstream/width/plan.py, which leaves LR and eps to
    `get_mup_config_overrides` under --use-mup, and `IDENTIFIER_KEYS` in upstream/width/groups.py."""
    assert "get_mup_config_overrides" in names
    assert "parameterization" not in names


def identifier_keys() -> tuple[str, ...]:
    from megatron.core.optimizer import optimizer

    return tuple(optimizer.param_group_identifier_keys)


def test_groups_are_matched_by_what_the_audit_compares(pool: Pool) -> None:
    """A key less would let the audit pass groups that Megatron mixes up on resume. `optimizer` and
    `default_config` say which class steps a group: the audit compares the groups of each on its own."""
    (keys,) = pool.run(identifier_keys, distributed=False)
    assert set(IDENTIFIER_KEYS) <= set(keys)
    assert set(keys) - set(IDENTIFIER_KEYS) <= {"optimizer"}


def identities(runs: list[list[str]]) -> list[list[tuple[Any, ...]]]:
    """In a worker: by what Megatron would tell the groups of each run apart if LR were no part of it."""
    builder, found = Builder(), []
    for run in runs:
        built = builder.build(run)
        keys = [key for key in IDENTIFIER_KEYS if key not in ("max_lr", "min_lr")]
        groups = [group for child in built.optimizer.chained_optimizers for group in child.optimizer.param_groups]
        found.append([tuple(group.get(key) for key in keys) for group in groups])
    return found


@pytest.mark.parametrize("model", ["llama", "moe"])
def test_groups_stay_apart_without_lr_in_their_identity(pool: Pool, model: str) -> None:
    """PR 4829 would take LR out of it; `lr_mult`, which is ours, stays."""
    runs = [argv(model, case) for case in CASES.values()]
    for name, groups in zip(CASES, pool.run(identities, runs=runs)[0], strict=True):
        assert len(set(groups)) == len(groups), name


def test_overriding_the_schedule_keeps_every_groups_lr(pool: Pool, tmp_path: Path) -> None:
    """In 0.20 --override-opt-param-scheduler gives every group --lr after a load; the groups get theirs back."""
    common = [*TINY, "--width-scaling", "sqrt", "--base-hidden-size", "8", "--use-distributed-optimizer"]
    saving = ["--save", str(tmp_path), "--save-interval", "2", "--ckpt-format", "torch_dist"]
    first = pool.run(train, ranks=2, argv=[*common, *saving], steps=2, hooks=ObservedWithPatch())[0]
    argv = [*common, "--load", str(tmp_path), "--override-opt-param-scheduler"]
    resumed = pool.run(train, ranks=2, argv=argv, steps=4, hooks=ObservedWithPatch())[0]
    assert resumed.extra.peaks == first.extra.peaks
    assert {round(lr, 6) for lr, _ in resumed.extra.peaks} == {0.005, 0.01}
    assert resumed.extra.rates[0] == first.extra.rates[-1]
