"""Which runs are made on which machine."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_patch.selfcheck.sizes import BUSY, QUICK, QUICKSTART, SMALL, CostSize, Size

EXPERTS = (
    "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 64 --moe-token-dispatcher-type alltoall "
    "--moe-router-load-balancing-type none --moe-aux-loss-coeff 0"
).split()
LOCAL = ["--transformer-impl", "local"]
# What a GPU run of the local spec does without, so that it is the arithmetic of the CPU run and no fused kernel's.
PLAIN_KERNELS = (
    "--no-persist-layer-norm --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-gelu-fusion "
    "--no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion --attention-backend unfused"
).split()
# What torch alone compiles and fuses; the kernels that are left out are Apex's or Transformer Engine's.
COMPILED = (
    "--no-persist-layer-norm --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-rope-fusion"
).split()
# The fused kernel is Apex's, which is not asked for.
TE = ["--transformer-impl", "transformer_engine", "--no-gradient-accumulation-fusion"]
DETERMINISTIC = ["--deterministic-mode", "--attention-backend", "unfused"]
FP8 = ("delayed", "tensorwise", "blockwise", "mxfp8")
GPU_LIMIT, CPU_LIMIT = 150.0, 900.0
"""Seconds for one run; a machine without a GPU may be busy with anything."""
LAYOUTS = {
    "tp2-sp": "--tensor-model-parallel-size 2 --sequence-parallel".split(),
    "dp2": ["--use-distributed-optimizer"],
    "pp2": "--pipeline-model-parallel-size 2".split(),
    "ep2": [*EXPERTS, "--expert-model-parallel-size", "2"],
}


@dataclass(frozen=True)
class Spec:
    """One run."""

    name: str
    flags: tuple[str, ...]
    size: Size | CostSize
    device: str = "cpu"
    """cpu or cuda."""
    ranks: int = 1
    limit: float = 0.0
    """Seconds after which it is ended."""
    exact: tuple[int, ...] = ()
    """Steps whose metrics are computed in float64 as well."""
    after: str = ""
    """A run that must have ended before this one starts."""
    alone: bool = False
    """Whether nothing else may run beside it."""
    mode: str = "train"
    """``train``; ``cost``: steps are timed; ``refusal``: ends with exit code 2 before anything is trained."""
    environment: Mapping[str, str] = field(default_factory=dict)
    script: str = ""
    """The Megatron script that is watched; by default launch/pretrain.py."""


@dataclass(frozen=True)
class Machine:
    """What decides which runs there are."""

    gpus: int
    te: bool
    fp8: Mapping[str, str]
    """Recipe -> why this machine does not have it; empty where it does."""
    quick: bool

    @classmethod
    def of(cls, facts: Mapping[str, Any], cpu: bool, quick: bool) -> "Machine":
        """Return it from what the probe has found.

        Args:
            facts: of the probe.
            cpu: whether GPUs are left alone.
            quick: whether small models are to do.
        """
        if cpu:
            return cls(0, False, dict.fromkeys(FP8, "needs a GPU"), quick)
        return cls(len(facts["gpus"]), bool(facts["transformer_engine"]), facts["fp8"], quick)

    @property
    def device(self) -> str:
        """cpu or cuda."""
        return "cuda" if self.gpus else "cpu"

    @property
    def size(self) -> Size:
        """Of the proxy."""
        return QUICK if self.quick else QUICKSTART

    def spec(self, name: str, flags: list[str], **more: Any) -> Spec:
        """Return a run of the proxy on this machine's device."""
        size = more.pop("size", self.size)
        device = more.pop("device", self.device)
        more.setdefault("limit", GPU_LIMIT if self.gpus else CPU_LIMIT)
        return Spec(name, (*size.flags(), *flags), size, device, **more)


def saving(size: Size) -> list[str]:
    """Return the flags of a run that saves at half its length, into the folder ``{folder}``."""
    return ["--save", "{folder}/checkpoints", "--save-interval", str(size.half)]


def measuring(size: Size) -> list[str]:
    """Return the flags of a run that measures every token of its micro batch."""
    tokens = size.length * size.batch
    return (
        f"--alignment-interval {size.interval} --alignment-tokens {tokens} --spectral-interval {size.interval}".split()
    )


def resumed(name: str, size: Size) -> list[str]:
    """Return the flags of a run that goes on from half of run `name`."""
    return ["--load", f"{{runs}}/{name}/checkpoints", "--ckpt-step", str(size.half)]


def cpu_runs(machine: Machine) -> list[Spec]:
    """Return the runs of a machine without GPUs."""
    size, spec, measured = machine.size, machine.spec, measuring(machine.size)
    runs = [
        spec("fp32", [*measured, *saving(size)], exact=size.exact),
        spec("bf16", ["--bf16", "--use-distributed-optimizer", *measured], exact=size.exact),
        spec("experts", [*EXPERTS, *measured], exact=size.exact),
        spec("resumed", [*measured, *resumed("fp32", size)], after="fp32"),
        spec("tp2-sp", [*LAYOUTS["tp2-sp"], *measured], ranks=2),
        Spec("cost", tuple(SMALL.flags()), SMALL, mode="cost", alone=True, limit=CPU_LIMIT),
    ]
    if not machine.quick:
        others = ("dp2", "pp2", "ep2")
        runs[-1:-1] = [halved(spec(name, [*LAYOUTS[name], *measured], ranks=2)) for name in others]
    return runs


def halved(spec: Spec) -> Spec:
    """Return a run on two data-parallel ranks, whose micro batches are half of the step's."""
    if spec.name not in ("dp2", "ep2"):
        return spec
    assert isinstance(spec.size, Size)
    flags = list(spec.flags)
    flags[flags.index("--micro-batch-size") + 1] = str(spec.size.batch // 2)
    flags[flags.index("--alignment-tokens") + 1] = str(spec.size.batch * spec.size.length // 2)
    return Spec(**{**vars(spec), "flags": tuple(flags)})


def gpu_runs(machine: Machine) -> list[Spec]:
    """Return the runs of a machine with GPUs, the ones that everything rests on first."""
    size, spec, measured = machine.size, machine.spec, measuring(machine.size)
    local = [*LOCAL, *PLAIN_KERNELS]
    bf16 = ["--bf16", *TE]
    distributed = "--use-distributed-optimizer"
    runs = [
        spec("cpu-fp32", measured, device="cpu", limit=240.0),
        spec("fp32", [*local, *measured], exact=size.exact),
        spec("fused", [*LOCAL, *COMPILED, "--bf16", *measured], exact=size.exact),
    ]  # fmt: skip
    if machine.te:
        runs += [
            spec("te-fp32", TE),
            spec("bf16", [*bf16, distributed, *measured], exact=size.exact),
            spec("experts", [*bf16, *EXPERTS, "--moe-grouped-gemm", *measured], exact=size.exact),
            *(
                spec(f"fp8-{recipe}", [*bf16, "--fp8-format", "hybrid", "--fp8-recipe", recipe, *measured],
                     exact=size.exact)
                for recipe in FP8
                if not machine.fp8[recipe]
            ),
            spec("precision-aware", [*bf16, distributed, "--use-precision-aware-optimizer"]),
            spec("graphs", [*bf16, "--cuda-graph-impl", "local", "--te-rng-tracker"]),
        ]  # fmt: skip
        if not machine.fp8["delayed"]:
            gather = "--fp8-format hybrid --fp8-recipe delayed --fp8-param-gather".split()
            runs.append(spec("fp8-param-gather", [*bf16, distributed, *gather]))
    deterministic = [*(["--bf16", *TE] if machine.te else local), *measured]
    deterministic += [word for word in DETERMINISTIC if word not in deterministic]
    runs += [
        spec("saved", [*deterministic, *saving(size)]),
        spec("resumed", [*deterministic, *resumed("saved", size)], after="saved"),
        spec("graphs-and-metrics", [*local, *measured, "--cuda-graph-impl", "local"], mode="refusal"),
    ]
    if machine.gpus > 1 and machine.te:
        runs += [
            halved(spec(name, [*bf16, *flags, *measured], ranks=2))
            for name, flags in LAYOUTS.items()
        ]  # fmt: skip
    kernels = ["--bf16", *(TE if machine.te else [*LOCAL, *COMPILED]), distributed]
    cost = SMALL if machine.quick else BUSY
    runs.append(Spec("cost", (*cost.flags(), *kernels), cost, "cuda", mode="cost", alone=True, limit=180.0))
    return runs


def runs_of(machine: Machine) -> list[Spec]:
    """Return all runs of a machine."""
    make: Callable[[Machine], list[Spec]] = gpu_runs if machine.gpus else cpu_runs
    return make(machine)
