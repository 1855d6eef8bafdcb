"""Real, unmodified Megatron on CPU: every layout gives the losses of one rank, and everything can be undone."""

import ast
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_patch.errors import ConfigError, UpstreamChanged
from megatron_patch.upstream.cpu import platform as cpu_platform
from megatron_patch.upstream.cpu import torch_stand_ins as cpu_torch
from megatron_patch.upstream.cpu.platform import CPU_DEFAULTS, STAND_INS, cpu_arguments
from megatron_patch.upstream.refusals import TABLE, Feature
from tests.support.pool import Pool
from tests.support.training import MOE, TINY, Outcome, train

# --- activation ------------------------------------------------------------------------------------------------------


def test_importing_the_platform_imports_no_torch() -> None:
    code = "import sys, megatron_patch.upstream.cpu.platform; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _refused() -> None:
    import torch

    cpu_platform.activate().deactivate()  # the pool's own activation
    originals = [(owner, name, value) for owner, name, value in (cpu_platform._resolve(s.target) for s in STAND_INS)]
    del os.environ["TORCHDYNAMO_DISABLE"]
    torch.cuda.is_available = lambda: True
    with pytest.raises(ConfigError, match="--cpu"):
        cpu_platform.activate()
    assert cpu_platform._live is None
    assert "TORCHDYNAMO_DISABLE" not in os.environ
    assert all(getattr(owner, name) is value for owner, name, value in originals if name != "is_available")


def test_refused_where_cuda_is_present(pool: Pool) -> None:
    pool.run(_refused, distributed=False)


def test_every_stand_in_has_one_target_and_a_reason() -> None:
    assert len({s.target for s in STAND_INS}) == len(STAND_INS)
    assert all(s.reason for s in STAND_INS)
    assert not any(s.target == "torch:cuda" for s in STAND_INS)  # torch.cuda as a whole stays


def _activate_and_restore() -> None:
    cpu_platform.activate().deactivate()  # the pool's own activation
    places = [cpu_platform._resolve(s.target) for s in STAND_INS]
    own = [name in vars(owner) for owner, name, _ in places]

    platform = cpu_platform.activate()
    assert cpu_platform.activate() is platform, "a second activation returns the live one"
    for stand_in, (owner, name, original) in zip(STAND_INS, places, strict=True):
        # What is False without mamba_ssm stays False.
        assert getattr(owner, name) is not original or stand_in.replacement is original, name
    with platform:
        pass
    for (owner, name, original), was_own in zip(places, own, strict=True):
        assert getattr(owner, name) is original, name
        assert (name in vars(owner)) is was_own, name
    assert cpu_platform._live is None

    with pytest.raises(UpstreamChanged, match="no_such_name"):
        cpu_platform.CpuPlatform(STAND_INS, [cpu_torch.StandIn("torch.cuda:no_such_name", None, "none")])
    assert all(getattr(owner, name) is original for owner, name, original in places), "half an activation was left"


def test_deactivation_restores_every_symbol(pool: Pool) -> None:
    pool.run(_activate_and_restore, distributed=False)


def _devices() -> None:
    import torch

    for device in ("cuda", "cuda:3", torch.device("cuda", 1), 0, torch.cuda.current_device(), None):
        assert torch.zeros(2, device=device).device.type == "cpu"
        assert torch.ones(2).to(device).device.type == "cpu" if device is not None else True
        assert torch.ones(2).to(device=device, dtype=torch.bfloat16).dtype is torch.bfloat16
    assert torch.nn.Linear(2, 2).cuda(0).weight.cuda().device.type == "cpu"
    assert torch.empty(2, pin_memory=True).device.type == "cpu"
    with torch.device("meta"):
        assert torch.zeros(2).is_meta, "torch's own device context must still see the factories"
    assert torch.ones(2).to("meta").is_meta
    # Torch itself must not be misled: its optimizers, loaders and checkpoints ask torch.accelerator.
    assert not torch.accelerator.is_available()
    assert torch.ones(1).type() == "torch.FloatTensor"
    # CUDA's generator is the CPU's.
    torch.cuda.manual_seed(3)
    state, first = torch.cuda.get_rng_state(), torch.rand(2)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(2), first)


def test_cuda_devices_mean_the_cpu(pool: Pool) -> None:
    pool.run(_devices, distributed=False)


def _device_calls(folder: Path) -> set[str]:
    """The functions `torch.f` that Megatron's source calls with `device=`, e.g. {"zeros"}."""
    found = set()
    for file in folder.rglob("*.py"):
        text = file.read_text()
        if "device=" not in text or {"inference", "fsdp", "resharding"} & set(file.relative_to(folder).parts):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and any(keyword.arg == "device" for keyword in node.keywords):
                name = ast.unparse(node.func)
                if name.startswith("torch."):
                    found.add(name.removeprefix("torch."))
    return found


def test_every_factory_that_megatron_gives_a_device_is_wrapped() -> None:
    import importlib.util

    spec = importlib.util.find_spec("megatron.training")
    assert spec is not None and spec.submodule_search_locations is not None
    root = Path(spec.submodule_search_locations[0]).parent
    wrapped = {target.removeprefix("torch:") for target in cpu_torch.FACTORIES}
    other = {"cuda.Stream", "cuda.random.get_rng_state", "distributed._coalescing_manager"}  # make no tensor
    used = _device_calls(root / "core") | _device_calls(root / "training")
    assert {"zeros", "empty", "tensor"} <= used
    assert used - wrapped - other == set()


# --- environment and arguments ---------------------------------------------------------------------------------------


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    names = [name for name, *_ in cpu_platform.ENVIRONMENT]
    for name in (*names, "OMP_NUM_THREADS", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # remembered, so that what the call sets is undone
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    return monkeypatch


def test_environment_of_plain_python(no_launcher: pytest.MonkeyPatch) -> None:
    cpu_platform.prepare_environment()
    assert {name: os.environ[name] for name, *_ in cpu_platform.ENVIRONMENT} == {
        "TORCHDYNAMO_DISABLE": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    assert os.environ["OMP_NUM_THREADS"] == "8"
    assert "MASTER_PORT" not in os.environ  # nobody to meet


@pytest.mark.parametrize("variable", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])  # torchrun's and the deepspeed launcher's
def test_environment_under_a_launcher(no_launcher: pytest.MonkeyPatch, variable: str) -> None:
    no_launcher.setenv(variable, "4")
    no_launcher.setenv("RANK", "3")
    cpu_platform.prepare_environment()
    assert os.environ["OMP_NUM_THREADS"] == "2"
    assert cpu_torch.local_world_size() == 4
    assert "MASTER_ADDR" not in os.environ  # the launcher's business


def test_the_users_thread_number_stays(no_launcher: pytest.MonkeyPatch) -> None:
    no_launcher.setenv("OMP_NUM_THREADS", "3")
    cpu_platform.prepare_environment()
    assert os.environ["OMP_NUM_THREADS"] == "3"


def test_arguments_are_added_once_and_said() -> None:
    argv, said = cpu_arguments(["--num-layers", "2"])
    assert argv[:2] == ["--num-layers", "2"]
    assert argv[2:4] == ["--distributed-backend", "gloo"]
    assert len(said) == len(CPU_DEFAULTS)
    assert cpu_arguments(argv) == (argv, [])


def test_arguments_given_rightly_are_kept() -> None:
    given = ["--attention-backend=unfused", "--cuda-graph-impl", "none", "--no-rope-fusion"]
    argv, said = cpu_arguments(given)
    assert argv[: len(given)] == given
    assert not any("attention-backend" in line or "rope" in line for line in said)


@pytest.mark.parametrize(
    ("argv", "flag"),
    [
        (["--transformer-impl", "transformer_engine"], "--transformer-impl"),
        (["--distributed-backend=nccl"], "--distributed-backend"),
        (["--distributed-backend", "gloo", "--distributed-backend", "nccl"], "--distributed-backend"),  # the last wins
        (["--fp8-format", "hybrid"], "--fp8-format"),
        (["--moe-grouped-gemm", "--num-layers", "2"], "--moe-grouped-gemm"),
        (["--cuda-graph-impl", "local"], "--cuda-graph-impl"),
    ],
)
def test_contradicting_arguments_are_refused(argv: list[str], flag: str) -> None:
    with pytest.raises(ConfigError, match="with --cpu") as caught:
        cpu_arguments(argv)
    assert caught.value.flag == flag
    assert "drop the flag" in caught.value.fix


def _unknown_flags() -> list[str]:
    import argparse

    from megatron.training.arguments import add_megatron_arguments

    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(parser)
    ours = [words[0] for words, _ in CPU_DEFAULTS] + [row.flag for row in TABLE if row.feature is Feature.CPU]
    return [flag for flag in ours if flag not in parser._option_string_actions]


def test_megatron_knows_every_flag_named(pool: Pool) -> None:
    assert pool.run(_unknown_flags, distributed=False) == [[]]


# --- the norm --------------------------------------------------------------------------------------------------------


def _norms() -> None:
    from types import SimpleNamespace

    import torch
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    torch.manual_seed(1)
    for name, reference in (("LayerNorm", torch.nn.LayerNorm), ("RMSNorm", torch.nn.RMSNorm)):
        for dtype in (torch.float32, torch.bfloat16):
            for sequence_parallel in (False, True):
                config = SimpleNamespace(
                    normalization=name, layernorm_zero_centered_gamma=False, sequence_parallel=sequence_parallel
                )
                ours = WrappedTorchNorm(config, 48, eps=1e-3).to(dtype)
                theirs = reference(48, eps=1e-3).to(dtype)
                assert all(p.sequence_parallel is sequence_parallel for p in ours.parameters())
                assert set(ours.state_dict()) == set(theirs.state_dict())
                with torch.no_grad():
                    for p in ours.parameters():
                        p.normal_()
                theirs.load_state_dict(ours.state_dict())
                x = torch.randn(5, 2, 48, dtype=dtype)
                assert torch.equal(ours(x), theirs(x)), f"{name} {dtype} differs from torch's"

                # Zero-centred: weight w means gain 1 + w, starting at gain 1.
                config.layernorm_zero_centered_gamma = True
                centred = WrappedTorchNorm(config, 48, eps=1e-3).to(dtype)
                assert torch.equal(centred.weight, torch.zeros(48, dtype=dtype))
                exact = reference(48, eps=1e-3)
                with torch.no_grad():
                    for p in centred.parameters():
                        p.normal_(std=1e-2)
                    exact.load_state_dict({k: v.float() for k, v in centred.state_dict().items()})
                    exact.weight.add_(1)
                expected = exact(x.float()).to(dtype)  # everything in fp32, rounded once
                assert centred(x).dtype is dtype
                assert torch.equal(centred(x), expected), f"zero-centred {name} {dtype} differs from fp32"
    config.normalization = "L2Norm"
    with pytest.raises(ConfigError, match="--normalization"):
        WrappedTorchNorm(config, 48)


def test_the_norm_has_torchs_numbers_and_the_sequence_parallel_mark(pool: Pool) -> None:
    pool.run(_norms, distributed=False)


# --- training --------------------------------------------------------------------------------------------------------

# Layouts differ in the order of sums only. In fp32 that is some 1e-7 relative per step; Adam divides by the size of
# the gradient, so where a gradient is nearly zero it can grow, which 4 steps at lr 1e-2 leave at some 1e-6.
FP32 = 2e-5
BF16 = 2e-3  # 8 bits of mantissa: 4e-3 relative per rounding, averaged over 128 tokens

STEPS = 4
SEQUENCE_PARALLEL_MODEL = ("--normalization", "RMSNorm", "--apply-layernorm-1p", "--qk-layernorm")


class Reference:
    """One-rank runs, each from a checkpoint that other layouts start from as well, made when first asked for.

    Initial weights are the same at every tensor-parallel size, but not over pipeline stages and expert-parallel ranks.
    """

    def __init__(self, pool: Pool, folder: Path) -> None:
        self.pool, self.folder = pool, folder
        self.known: dict[tuple[str, ...], Outcome] = {}

    def start(self, model: tuple[str, ...]) -> list[str]:
        """Flags that start `model` from its checkpoint."""
        path = self.folder / str(abs(hash(model)))
        if not path.exists():
            self.pool.run(train, argv=[*TINY, *model, "--save", str(path), "--save-interval", "1"], steps=1)
        return [*TINY, *model, "--load", str(path), "--finetune"]

    def outcome(self, model: tuple[str, ...]) -> Outcome:
        if model not in self.known:
            self.known[model] = self.pool.run(train, argv=self.start(model), steps=STEPS)[0]
        return self.known[model]


@pytest.fixture(scope="module")
def reference(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(pool, tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize(
    ("ranks", "model", "layout"),
    [
        pytest.param(2, (), "", id="dp2"),
        pytest.param(2, (), "--use-distributed-optimizer", id="dp2-distributed-optimizer"),
        pytest.param(
            2,
            (),
            "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
            id="dp2-distributed-optimizer-overlapped",
        ),
        pytest.param(2, (), "--tensor-model-parallel-size 2", id="tp2"),
        pytest.param(
            2, SEQUENCE_PARALLEL_MODEL, "--tensor-model-parallel-size 2 --sequence-parallel", id="tp2-sequence-parallel"
        ),
        pytest.param(2, (), "--pipeline-model-parallel-size 2", id="pp2"),
        pytest.param(
            2,
            ("--num-layers", "4"),
            "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
            id="pp2-interleaved",
        ),
        pytest.param(2, MOE, "--expert-model-parallel-size 2", id="ep2-shared-expert"),
        pytest.param(
            4,
            MOE,
            "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2 "
            "--use-distributed-optimizer",
            id="tp2-sequence-parallel-ep2-dp2",
        ),
    ],
)
def test_a_layout_trains_as_one_rank_does(
    pool: Pool, reference: Reference, ranks: int, model: tuple[str, ...], layout: str
) -> None:
    expected = reference.outcome(model)
    found = pool.run(train, ranks=ranks, argv=[*reference.start(model), *layout.split()], steps=STEPS)[0]
    _assert_same(found, expected, FP32)


def _assert_same(found: Outcome, expected: Outcome, tolerance: float) -> None:
    assert len(found.losses) == len(found.grad_norms) == STEPS
    assert all(map(math.isfinite, found.losses))
    assert found.losses == pytest.approx(expected.losses, abs=tolerance)
    assert found.grad_norms == pytest.approx(expected.grad_norms, rel=20 * tolerance)
    norms = {name: checksum.norm for name, checksum in expected.checksums.items()}
    assert {name: checksum.norm for name, checksum in found.checksums.items()} == pytest.approx(
        norms, rel=20 * tolerance, abs=20 * tolerance
    )
    assert found.losses[-1] < found.losses[0] - 0.05, "it does not learn"


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        pytest.param(1, "--bf16", id="float16-optimizer"),
        pytest.param(2, "--bf16 --use-distributed-optimizer", id="distributed-optimizer"),
    ],
)
def test_bf16_trains(pool: Pool, reference: Reference, ranks: int, layout: str) -> None:
    found = pool.run(train, ranks=ranks, argv=[*reference.start(()), *layout.split()], steps=STEPS)[0]
    assert found.losses == pytest.approx(reference.outcome(()).losses, abs=BF16)
    assert found.losses != reference.outcome(()).losses, "it ran in fp32"


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        pytest.param(1, "", id="fp32-optimizer"),
        pytest.param(1, "--bf16", id="float16-optimizer"),
        pytest.param(2, "--use-distributed-optimizer", id="distributed-optimizer"),
        pytest.param(
            2, "--bf16 --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable", id="fully-reshardable"
        ),
    ],
)
def test_a_resumed_run_goes_on_bit_for_bit(pool: Pool, tmp_path: Path, ranks: int, layout: str) -> None:
    """Adam's step count shows from the second step after the resume on, in the loss of the third."""
    argv = [*TINY, *layout.split(), "--train-iters", "4"]
    whole = pool.run(train, ranks=ranks, argv=argv, steps=4)[0]
    stored = [*argv, "--save", str(tmp_path), "--save-interval", "100"]
    first = pool.run(train, ranks=ranks, argv=stored, steps=1)[0]
    second = pool.run(train, ranks=ranks, argv=[*stored, "--load", str(tmp_path)], steps=4)[0]
    assert first.losses + second.losses == whole.losses
    assert second.checksums == whole.checksums


def _tokens_of(argv: list[str]) -> Any:
    return train(argv, steps=1).losses


def test_weights_do_not_depend_on_the_tensor_parallel_size(pool: Pool) -> None:
    """Upstream's JIT warm-up draws random numbers, fewer with more tensor parallelism; it must not run here."""
    one = pool.run(_tokens_of, argv=list(TINY))[0]
    two = pool.run(_tokens_of, ranks=2, argv=[*TINY, "--tensor-model-parallel-size", "2"])[0]
    assert two == pytest.approx(one, abs=FP32)
