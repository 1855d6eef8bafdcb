"""Hooks: everything is checked before anything is touched, and everything can be undone. And they fit real Megatron."""

import argparse
import hashlib
import inspect
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from megatron_patch.config import EngineConfig, MetricsConfig, Settings, WarmupConfig, WidthConfig
from megatron_patch.errors import UpstreamChanged
from megatron_patch.upstream.hooks import Hook, Installation, after, around, before, check_version, install
from tests.support.pool import Pool

# --- on stubs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    """Two modules that look like Megatron's: `first` defines `build` and `step`, `second` defines `log`."""
    first, second = ModuleType("megatron.stub_first"), ModuleType("megatron.stub_second")

    def build(config: Any, model: Any, extra: int = 7) -> Any:
        return ("built", config, model, extra)

    def step(iteration: int) -> Any:
        return ("stepped", iteration)

    def log(*args: Any) -> Any:
        return ("logged", *args)

    for module, functions in ((first, (build, step)), (second, (log,))):
        for function in functions:
            function.__module__ = module.__name__
            setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return first, second


def loud(original: Callable[..., Any]) -> Callable[..., Any]:
    """A wrapper that can be told from its original."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return ("wrapped", original(*args, **kwargs))

    return wrapper


def hook(target: str, *parameters: str, **more: Any) -> Hook:
    return Hook(f"megatron.stub_{target}", parameters, loud, "test the hooks", **more)


ALL = (hook("first:build", "config", "model"), hook("first:step", "iteration"), hook("second:log"))


def everything(stubs: tuple[ModuleType, ModuleType]) -> dict[str, Any]:
    """What the stubs hold now."""
    return {f"{m.__name__}:{name}": value for m in stubs for name, value in vars(m).items() if name[0] != "_"}


def test_all_are_assigned_and_all_are_undone(stubs: tuple[ModuleType, ModuleType]) -> None:
    before = everything(stubs)
    installation = install(ALL)
    first, second = stubs
    assert first.build("c", "m") == ("wrapped", ("built", "c", "m", 7))
    assert first.step(3) == ("wrapped", ("stepped", 3))
    assert second.log() == ("wrapped", ("logged",))
    installation.remove()
    assert {name: value for name, value in everything(stubs).items() if value is not before[name]} == {}
    assert everything(stubs).keys() == before.keys()


def test_context_manager_undoes_after_an_error(stubs: tuple[ModuleType, ModuleType]) -> None:
    before = everything(stubs)

    def fail() -> None:
        with install(ALL):
            assert everything(stubs) != before
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert everything(stubs) == before


def test_removing_twice_is_harmless(stubs: tuple[ModuleType, ModuleType]) -> None:
    installation = install(ALL)
    installation.remove()
    stubs[0].build = loud(stubs[0].build)  # somebody else's business by now
    installation.remove()


def missing_symbol(stubs: tuple[ModuleType, ModuleType]) -> str:
    del stubs[1].log
    return "megatron.stub_second:log does not exist in this Megatron (needed to test the hooks)"


def missing_module(stubs: tuple[ModuleType, ModuleType]) -> str:
    del sys.modules[stubs[1].__name__]
    return "megatron.stub_second:log does not exist in this Megatron (needed to test the hooks)"


def missing_parameter(stubs: tuple[ModuleType, ModuleType]) -> str:
    def step(current: int) -> None: ...

    step.__module__ = stubs[0].__name__
    stubs[0].step = step
    return "megatron.stub_first:step has no parameter iteration any more (needed to test the hooks)"


def bound_elsewhere(stubs: tuple[ModuleType, ModuleType]) -> str:
    stubs[1].step = stubs[0].step
    return "megatron.stub_first:step is also bound in megatron.stub_second, where our hook would not reach"


def bound_elsewhere_under_another_name(stubs: tuple[ModuleType, ModuleType]) -> str:
    stubs[1].megatron_step = stubs[0].step  # type: ignore[attr-defined]
    return "megatron.stub_first:step is also bound in megatron.stub_second, where our hook would not reach"


def already_installed(stubs: tuple[ModuleType, ModuleType]) -> str:
    install((hook("second:log"),))
    return "megatron.stub_second:log is hooked already: install megatron_patch once per process"


REFUSALS = [
    missing_symbol,
    missing_module,
    missing_parameter,
    bound_elsewhere,
    bound_elsewhere_under_another_name,
    already_installed,
]


@pytest.mark.parametrize("prepare", REFUSALS)
def test_refusal_says_what_is_wrong_and_touches_nothing(
    stubs: tuple[ModuleType, ModuleType], prepare: Callable[[Any], str]
) -> None:
    message = prepare(stubs)
    before = everything(stubs)
    with pytest.raises(UpstreamChanged) as caught:
        install(ALL)
    assert str(caught.value) == message
    assert everything(stubs) == before
    for value in everything(stubs).values():
        assert getattr(value, "_megatron_patch", None) in (None, "megatron.stub_second:log")


def test_no_wrapper_is_made_before_all_are_checked(stubs: tuple[ModuleType, ModuleType]) -> None:
    """A wrapper may have effects of its own, such as importing."""
    made = []

    def note(original: Any) -> Any:
        made.append(original)
        return loud(original)

    with pytest.raises(UpstreamChanged):
        install((Hook("megatron.stub_first:build", (), note, "look"), hook("second:absent")))
    assert made == []


def test_the_same_target_twice_in_one_list(stubs: tuple[ModuleType, ModuleType]) -> None:
    """The second would silently replace the first."""
    before = everything(stubs)
    with pytest.raises(UpstreamChanged, match="hooked twice by megatron_patch itself"):
        install((hook("second:log"), hook("second:log")))
    assert everything(stubs) == before


def test_names_that_the_users_code_has_imported(
    stubs: tuple[ModuleType, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``from megatron... import step`` at the head of a script, or of a module beside it, gets the hook as well."""
    first, _ = stubs
    original, mine = first.step, ModuleType("mine")
    mine.take_step = original  # type: ignore[attr-defined]
    mine.kept = mine.changed = original  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mine", mine)
    monkeypatch.setattr(sys.modules["__main__"], "step", original, raising=False)
    installation = install(ALL)
    assert mine.take_step(1) == sys.modules["__main__"].step(1) == ("wrapped", ("stepped", 1))
    mine.changed = 5
    installation.remove()
    assert mine.take_step is mine.kept is sys.modules["__main__"].step is original
    assert mine.changed == 5


def test_our_own_modules_keep_what_they_imported(
    stubs: tuple[ModuleType, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrapper may build on the original by its name."""
    from megatron_patch.upstream import hooks

    monkeypatch.setattr(hooks, "step", stubs[0].step, raising=False)
    with install(ALL):
        assert hooks.step(1) == ("stepped", 1)  # type: ignore[attr-defined]


def test_bindings_that_are_allowed(stubs: tuple[ModuleType, ModuleType]) -> None:
    first, second = stubs
    second.step = first.step
    with install((hook("first:step", "iteration", also_bound_in=("megatron.stub_second",)),)):
        assert first.step(1) == ("wrapped", ("stepped", 1))
        assert second.step(1) == ("stepped", 1)
    # The module that defines a function keeps it, where the trainer imports it by name.
    with install((hook("second:step", "iteration"),)):
        assert second.step(1) == ("wrapped", ("stepped", 1))
        assert first.step(1) == ("stepped", 1)


def test_a_replacement_on_top_of_ours_is_not_undone(stubs: tuple[ModuleType, ModuleType]) -> None:
    """Neither theirs nor ours: undoing half would leave a chain with a hole."""
    installation = install(ALL)
    ours = everything(stubs)
    first, _ = stubs
    first.step = loud(first.step)
    on_top = first.step
    with pytest.raises(UpstreamChanged, match=r"^megatron\.stub_first:step was replaced again after megatron_patch"):
        installation.remove()
    assert everything(stubs) == {**ours, "megatron.stub_first:step": on_top}
    first.step = ours["megatron.stub_first:step"]  # as the message asks
    installation.remove()
    assert first.step(1) == ("stepped", 1)


def test_undone_in_reverse(stubs: tuple[ModuleType, ModuleType]) -> None:
    """Later installations go first: the earlier one refuses while it is covered."""
    outer = install((hook("first:step"),))
    covered = stubs[0].step
    del covered._megatron_patch  # as if another package, which knows nothing of ours, came between
    inner = install((hook("first:step"),))
    with pytest.raises(UpstreamChanged):
        outer.remove()
    inner.remove()
    assert stubs[0].step is covered
    outer.remove()
    assert stubs[0].step(1) == ("stepped", 1)


def _add(a: int, b: int = 2, *, c: int = 3) -> int:
    return a + b + c


@pytest.mark.parametrize(
    ("args", "kwargs", "seen"),
    [((1,), {}, (1, 2, 3)), ((), {"a": 1}, (1, 2, 3)), ((1, 5), {}, (1, 5, 3)), ((1,), {"c": 7}, (1, 2, 7))],
)
def test_handlers_get_what_they_name_however_it_is_given(
    args: tuple[int, ...], kwargs: dict[str, int], seen: tuple[int, int, int]
) -> None:
    told: list[tuple[int, ...]] = []
    assert before(lambda *values: told.append(values), "a", "b", "c")(_add)(*args, **kwargs) == sum(seen)
    assert after(lambda *values: told.append(values), "c", "a")(_add)(*args, **kwargs) == sum(seen)
    assert told == [seen, (sum(seen), seen[2], seen[0])]


def test_before_comes_first_and_after_last() -> None:
    order: list[str] = []

    def original() -> None:
        order.append("original")

    after(lambda result: order.append("after"))(before(lambda: order.append("before"))(original))()
    assert order == ["before", "original", "after"]


def test_around_decides_whether_and_with_what_the_original_is_called() -> None:
    assert around(lambda call, b: -call(b=b * 10), "b")(_add)(1, c=0) == -(1 + 20 + 0)
    assert around(lambda call: None)(_add)() is None
    assert around(lambda call: call())(_add).__name__ == "_add"


def test_a_handler_that_raises_keeps_the_original_from_being_called() -> None:
    called: list[int] = []

    def refuse(a: int) -> None:
        raise ValueError(a)

    with pytest.raises(ValueError, match="7"):
        before(refuse, "a")(lambda a: called.append(a))(7)
    assert not called


# --- versions --------------------------------------------------------------------------------------------------------


def fake_core(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    core = ModuleType("megatron.core")
    if version is not None:
        core.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megatron", ModuleType("megatron"))
    monkeypatch.setitem(sys.modules, "megatron.core", core)


@pytest.mark.parametrize("version", ["0.19", "0.19.0", "0.19.2", "0.19.2+local", "0.19.rc1"])
def test_tested_versions(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    fake_core(monkeypatch, version)
    assert check_version() == version


@pytest.mark.parametrize("version", ["0.18.9", "0.20.0", "0.1", "0.190.0", "1.0.19", "", None])
def test_untested_versions(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    fake_core(monkeypatch, version)
    with pytest.raises(
        UpstreamChanged, match=r"^megatron-core .*is tested with 0\.19 only; .*--allow-untested-megatron"
    ):
        check_version()
    assert check_version(allow_untested=True) == ("without a version" if version is None else version)


def test_no_megatron_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n == "megatron" or n.startswith("megatron.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "megatron", None)  # how the import system is told that there is none
    with pytest.raises(UpstreamChanged, match="megatron-core is not installed in this Python: pip install"):
        check_version(allow_untested=True)


# --- on the real Megatron --------------------------------------------------------------------------------------------

EVERYTHING = Settings(
    WidthConfig("sqrt", 32),
    WarmupConfig("decay-away"),
    MetricsConfig(1, spectral_interval=1, directory="x"),
    EngineConfig(True, "x.json"),
)


def all_hooks() -> list[Hook]:
    """In a worker: every hook that there is."""
    from megatron_patch.hosts.heartbeat import Heart
    from megatron_patch.upstream.heartbeat import heartbeat_hooks
    from megatron_patch.upstream.patch import Session, entry_hooks, feature_hooks

    return [*entry_hooks(Session()), *feature_hooks(EVERYTHING), *heartbeat_hooks(Heart())]


def contract() -> dict[str, list[str]]:
    """In a worker: each target of ours with the parameters it has, after all hooks were installed and removed."""
    import importlib

    check_version(allow_untested="MEGATRON_NEXT" in os.environ)  # set by .ci/test_next
    hooks = all_hooks()
    found = {}
    for h in hooks:
        module, _, name = h.target.partition(":")
        found[h.target] = (importlib.import_module(module), name, getattr(importlib.import_module(module), name))
    with install(hooks) as installation:
        assert isinstance(installation, Installation)
        for module, name, original in found.values():
            assert getattr(module, name) is not original
    for module, name, original in found.values():
        assert getattr(module, name) is original
        assert not hasattr(original, "_megatron_patch")
    assert all(h.why for h in hooks)
    for h in hooks:
        assert set(h.parameters) <= set(inspect.signature(found[h.target][2]).parameters)
    return {target: list(inspect.signature(original).parameters) for target, (_, _, original) in found.items()}


# What the wrappers in upstream/patch.py read by name, on top of what they pass on untouched. Written down here by hand,
# so that a hook whose list of parameters falls behind its wrapper is found.
READ = {
    "megatron.training.arguments:add_megatron_arguments": {"parser"},
    "megatron.training.arguments:validate_args": {"args"},
    "megatron.core.datasets.utils:compile_helpers": set(),
    "megatron.training.checkpointing:load_args_from_checkpoint": set(),
    "megatron.training.training:get_megatron_optimizer": {"config", "model_chunks", "config_overrides"},
    "megatron.training.training:OptimizerParamScheduler": {
        "optimizer",
        "init_lr",
        "max_lr",
        "min_lr",
        "lr_warmup_steps",
        "lr_decay_steps",
        "lr_decay_style",
        "start_wd",
        "end_wd",
    },
    "megatron.training.checkpointing:_load_base_checkpoint": set(),
    "megatron.training.training:setup_model_and_optimizer": set(),
    "megatron.training.training:training_log": {"loss_dict", "iteration"},
    "megatron.training.training:evaluate": set(),
    "megatron.training.training:evaluate_and_print_results": {"prefix", "iteration"},
    "megatron.training.training:train": set(),
    "megatron.training.training:wrap_model_chunks_with_ddp": {"model_chunks", "config", "ddp_config"},
    "megatron.training.models.dist_utils:_ddp_wrap": {"model", "ddp_config"},
    "megatron.core.pipeline_parallel.schedules:backward_step": {"output_tensor"},
    "megatron.training.training:save_checkpoint": {"iteration", "model", "optimizer"},
    "megatron.training.training:load_checkpoint": {"ddp_model", "optimizer", "load_arg"},
    "megatron.training.ft_integration:setup": set(),
    "megatron.training.ft_integration:on_training_step_start": set(),
    "megatron.training.ft_integration:on_eval_step_start": set(),
    "megatron.training.ft_integration:on_checkpointing_start": set(),
    "megatron.training.ft_integration:shutdown": set(),
    "megatron.training.ft_integration:on_training_step_end": set(),
    "megatron.training.ft_integration:on_eval_step_end": set(),
    "megatron.training.ft_integration:on_checkpointing_end": set(),
}


def test_contract_with_real_megatron(pool: Pool) -> None:
    (parameters,) = pool.run(contract, distributed=False)
    assert parameters.keys() == READ.keys()
    for target, names in READ.items():
        assert names <= set(parameters[target]), target


# The start of the SHA-256 of every hooked function's source in megatron-core 0.19.2. A changed body stops no run, since
# a signature is all that a wrapper relies on; but somebody should read it again, and then note the new one here.
SOURCES = {
    "megatron.training.arguments:add_megatron_arguments": "580b80fbe586",
    "megatron.training.arguments:validate_args": "47bfcd3af0d8",
    "megatron.core.datasets.utils:compile_helpers": "84029a50ae8c",
    "megatron.training.checkpointing:load_args_from_checkpoint": "f10371ee69b2",
    "megatron.training.training:get_megatron_optimizer": "b473223298c4",
    "megatron.training.training:OptimizerParamScheduler": "2936733983b5",
    "megatron.training.checkpointing:_load_base_checkpoint": "9a7e9e8de242",
    "megatron.training.training:setup_model_and_optimizer": "3d67da87effa",
    "megatron.training.training:training_log": "5e34a182d566",
    "megatron.training.training:evaluate": "a8be7269bc27",
    "megatron.training.training:evaluate_and_print_results": "699dfbe69cf2",
    "megatron.training.training:train": "3c2299658ae7",
    "megatron.training.training:wrap_model_chunks_with_ddp": "f172eba11769",
    "megatron.training.models.dist_utils:_ddp_wrap": "13b438c37660",
    "megatron.core.pipeline_parallel.schedules:backward_step": "435628e2479e",
    "megatron.training.training:save_checkpoint": "b652984ca8c8",
    "megatron.training.training:load_checkpoint": "4f03d48a7938",
    "megatron.training.ft_integration:setup": "02fece86f606",
    "megatron.training.ft_integration:on_training_step_start": "849a0917bdf2",
    "megatron.training.ft_integration:on_eval_step_start": "f8c324fac852",
    "megatron.training.ft_integration:on_checkpointing_start": "4456a1acceca",
    "megatron.training.ft_integration:shutdown": "e301bbca8b29",
    "megatron.training.ft_integration:on_training_step_end": "88dd43bbbe36",
    "megatron.training.ft_integration:on_eval_step_end": "66d8f3661a71",
    "megatron.training.ft_integration:on_checkpointing_end": "ee815b4ab24e",
}


DISTRIBUTED_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"
MIXER = tuple(
    f"megatron.core.ssm.mamba_mixer:{name}"
    for name in (
        "HAVE_MAMBA_SSM",
        "MAMBA_HAS_STATE_DTYPE",
        "ExtendedRMSNorm",
        "mamba_chunk_scan_combined",
        "mamba_split_conv1d_scan_combined",
    )
)
# The same of what the CPU platform replaces in Megatron (upstream/cpu/megatron_stand_ins.py).
STOOD_IN_FOR = {
    "megatron.training.initialize:_warmup_jit_function": "e7c1707d8b9b",
    "megatron.core.transformer.dot_product_attention:DotProductAttention.forward": "1450046fe34e",
    "megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu": "8fc5847a887d",
    f"{DISTRIBUTED_OPTIMIZER}.state_dict": "fe621ae6a622",
    f"{DISTRIBUTED_OPTIMIZER}._set_main_param_and_optimizer_states": "40cab7846597",
    f"{DISTRIBUTED_OPTIMIZER}.load_state_dict": "7e5f988b86b4",
    "megatron.core.tensor_parallel.mappings:_gather_along_first_dim": "44633fe36d60",
    "megatron.core.optimizer.layer_wise_optimizer:LayerWiseDistributedOptimizer.allgather_params": "1e318a95ce03",
    "megatron.core.tensor_parallel.random:_set_cuda_rng_state": "b179c9d95438",
    "megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__": "e3b2175ddc1a",
    "megatron.core.models.hybrid.hybrid_block:TENorm": "8f31e2dfaa34",
    "megatron.core.models.hybrid.hybrid_layer_specs:hybrid_stack_spec.submodules": "785cec6bd15b",
    **dict.fromkeys(MIXER, "f896af27f0af"),
}


# Of the bodies above, those that the coming release has changed: read again, and what replaces them still fits.
# Read in Megatron-LM d98e8a64 of 2026-08-22 (`make test-next`); a later one names what changed since.
NEXT_RELEASE = "0.20"
CHANGED_IN_NEXT = {
    "megatron.core.pipeline_parallel.schedules:backward_step": "b767f2485190",  # a profiler's decorator
    "megatron.training.arguments:validate_args": "d2c14d0d340f",  # FSDP v2, RL, hidden state mixing
    "megatron.training.checkpointing:_load_base_checkpoint": "9a3c6812a389",  # an exit code; FSDP
    "megatron.training.checkpointing:load_args_from_checkpoint": "9ac172174435",  # one more argument
    "megatron.training.models.dist_utils:_ddp_wrap": "7a11238698df",  # layer-wise optimizer's layout
    "megatron.training.training:evaluate": "78c21eb32f62",  # tracing, losses averaged over rematerialising ranks too
    "megatron.training.training:get_megatron_optimizer": "a4db1e83c8df",  # FSDP v2, which drops empty groups
    # --override-opt-param-scheduler gives every group --lr: see PlannedRun.audit, tests/upstream/test_next.py
    "megatron.training.training:load_checkpoint": "06adc6c285a8",
    "megatron.training.training:save_checkpoint": "25f96ec2840f",  # tracing, frozen layers write no weights
    "megatron.training.training:setup_model_and_optimizer": "4cba487de2df",  # frozen layers, layer-wise optimizer
    "megatron.training.training:train": "dee079c89cce",  # tracing, FSDP v2
    "megatron.training.training:training_log": "03adda0fdaca",  # tracing
    "megatron.core.models.hybrid.hybrid_block:TENorm": "911a0b5c3559",  # another kind of gated delta net
    "megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__": "a913e4ff1e57",  # marked as without a residual
    **dict.fromkeys(MIXER, "a582dee05869"),  # inference
}


# What a stand-in for something other than a function or class takes the place of.
READ_INSTEAD = {
    "megatron.core.models.hybrid.hybrid_layer_specs:hybrid_stack_spec.submodules": (
        "megatron.core.models.hybrid.hybrid_block:HybridStackSubmodules"
    ),
    "megatron.core.models.hybrid.hybrid_block:TENorm": "megatron.core.models.hybrid.hybrid_block:HybridStack.__init__",
    **dict.fromkeys(MIXER, "megatron.core.ssm.mamba_mixer:MambaMixer"),
}


def fingerprint(original: Any) -> str:
    return hashlib.sha256(inspect.getsource(original).encode()).hexdigest()[:12]


def fingerprints() -> tuple[dict[str, str], dict[str, str], str]:
    """In a worker: both tables for the installed Megatron, and its version."""
    import importlib

    from megatron_patch.upstream.cpu import platform as cpu_platform
    from megatron_patch.upstream.cpu.megatron_stand_ins import MEGATRON_STAND_INS

    hooked = {}
    for h in all_hooks():
        module, _, name = h.target.partition(":")
        hooked[h.target] = fingerprint(getattr(importlib.import_module(module), name))
    cpu_platform.activate().deactivate()  # it is live in every worker
    stood_in_for = {}
    for stand_in in MEGATRON_STAND_INS:
        owner, name, original = cpu_platform._resolve(READ_INSTEAD.get(stand_in.target, stand_in.target))
        stood_in_for[stand_in.target] = fingerprint(owner if name == "__new__" else original)  # a class, as a whole
    return hooked, stood_in_for, importlib.import_module("megatron.core").__version__


def test_hooked_functions_are_those_we_have_read(pool: Pool) -> None:
    ((hooked, stood_in_for, version),) = pool.run(fingerprints, distributed=False)
    changes = CHANGED_IN_NEXT if version.startswith(f"{NEXT_RELEASE}.") else {}
    changed = [
        f"{target} is now {found.get(target)}: reread it and what replaces it in upstream/{file}, then correct "
        f"{'CHANGED_IN_NEXT' if changes else table}"
        for found, read, file, table in (
            (hooked, SOURCES, "patch.py", "SOURCES"),
            (stood_in_for, STOOD_IN_FOR, "cpu/megatron_stand_ins.py", "STOOD_IN_FOR"),
        )
        for target in sorted({*found, *read})
        if found.get(target) != changes.get(target, read.get(target))
    ]
    assert not changed, "\n".join(changed)


def second_installation() -> str:
    """In a worker: what a second `run` in one process is told."""
    from megatron_patch.upstream.patch import Session

    Session().begin()
    try:
        Session().begin()
    except UpstreamChanged as error:
        return str(error)
    return ""


def test_installing_twice_on_real_megatron(pool: Pool) -> None:
    assert pool.run(second_installation, distributed=False) == [
        "megatron.training.arguments:add_megatron_arguments is hooked already: install megatron_patch once per process"
    ]


def session_from_begin_to_end() -> dict[str, Any]:
    """In a worker: whether the hooks of a function from each list are there, along the life of a session."""
    from megatron.training import arguments, training

    from megatron_patch.upstream import flags
    from megatron_patch.upstream.patch import Session

    def hooked() -> tuple[bool, bool]:
        return hasattr(arguments.validate_args, "_megatron_patch"), hasattr(training.train, "_megatron_patch")

    asked = Settings()
    flags.validate_around = lambda megatrons, args, default_of: (megatrons(), asked)
    arguments.validate_args = lambda args: args  # Megatron's own validation is not what is looked at
    originals = arguments.validate_args, training.train
    parsers: list[Any] = []
    session = Session()
    found: dict[str, Any] = {"before": (hooked(), session.active)}
    session.begin(parsers.append)
    arguments.add_megatron_arguments(argparse.ArgumentParser())
    found["begun"] = (hooked(), session.active, len(parsers))
    arguments.validate_args(None)
    found["nothing asked for"] = (hooked(), session.active)
    asked = Settings(EVERYTHING.width)
    arguments.validate_args(None)
    found["a rule asked for"] = (hooked(), session.active)
    ours, training.train = training.train, lambda: None
    for name, attempt in (("check", session.check), ("remove", session.remove)):
        try:
            attempt()
        except UpstreamChanged as error:
            found[name] = (str(error), hooked(), session.active)
    training.train = ours
    session.check()
    session.remove()
    found["removed"] = (hooked(), session.active, (arguments.validate_args, training.train) == originals)
    session.remove()
    session.begin()
    found["begun again"] = (hooked(), session.active)
    return found


def test_a_session_installs_what_is_asked_for_and_removes_all_or_nothing(pool: Pool) -> None:
    (found,) = pool.run(session_from_begin_to_end, distributed=False)
    # The function that is put on top of ours has no mark; validation, which is removed last, must be left as it was.
    covered = (
        "megatron.training.training:train was replaced again after megatron_patch; undo that first",
        (True, False),
        True,
    )
    assert found == {
        "before": ((False, False), False),
        "begun": ((True, False), False, 1),
        "nothing asked for": ((True, False), False),
        "a rule asked for": ((True, True), True),
        "check": covered,
        "remove": covered,
        "removed": ((False, False), False, True),
        "begun again": ((True, False), False),
    }


def set_up_without_a_plan() -> list[str]:
    """In a worker: what is said to an optimizer that was built behind our back, and to none at all."""
    from megatron.training import global_vars

    from megatron_patch.errors import AuditError
    from megatron_patch.upstream.patch import feature_hooks

    global_vars._GLOBAL_ARGS = object()
    said = []
    for optimizer in (None, object()):
        (hook,) = (h for h in feature_hooks(EVERYTHING) if h.target.endswith(":setup_model_and_optimizer"))
        set_up = hook.wrap(lambda optimizer=optimizer: ("model", optimizer, "scheduler"))
        try:
            said.append(str(set_up()[0]))
        except AuditError as error:
            said.append(str(error))
    return said


def test_an_optimizer_without_a_plan_is_refused(pool: Pool) -> None:
    """Else a run that asked for a rule would go on without it, and without an audit."""
    ((evaluation, training),) = pool.run(set_up_without_a_plan, distributed=False)
    assert evaluation == "model"  # evaluation alone has no optimizer
    assert training.startswith("the optimizer was not built by get_megatron_optimizer")
