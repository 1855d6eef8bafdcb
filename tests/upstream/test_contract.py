"""Our hooks and the real Megatron: what it must have, and which of its functions we have read."""

import argparse
import hashlib
import inspect
import os
from typing import Any

from megatron_patch.config import EngineConfig, MetricsConfig, Settings, WarmupConfig, WidthConfig
from megatron_patch.errors import UpstreamChanged
from megatron_patch.upstream.hooks import Hook, Installation, check_version, install
from tests.support.pool import Pool

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
