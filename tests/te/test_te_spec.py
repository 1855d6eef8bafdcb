"""With the real Transformer Engine: its layer spec is understood, and the metrics are those of the float64 reference.

Needs the environment that `.ci/install_te.sh` makes; everywhere else the whole file is skipped.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.support.layouts import (
    DISTRIBUTED,
    EP2,
    LATENT,
    LLAMA,
    METRICS,
    MIXTURE,
    PP2,
    SAMPLED,
    SP,
    STEPS,
    TP2,
    differences,
)
from tests.support.monitored import Monitored, allow_on_cpu, read_lines
from tests.support.pool import Pool
from tests.support.reference import Model, local_spec_name
from tests.support.training import TINY, Run, train

pytestmark = pytest.mark.skipif(find_spec("transformer_engine") is None, reason="needs Transformer Engine")

CP2 = ("--context-parallel-size", "2")
GROUPED = ("--moe-grouped-gemm",)
GPT = Model(gated=False, norm="LayerNorm", bias=True, groups=4)


@dataclass
class WithTE(Monitored):
    """Builds the Transformer Engine spec on CPU, with plain forwards."""

    def before_arguments(self) -> None:
        super().before_arguments()
        from megatron_patch.upstream.cpu import platform as cpu_platform
        from tests.support import training
        from tests.te.forwards import stand_in

        stand_in()
        # The refusals are right for users, who have no stand-ins for TE's forwards.
        cpu_platform.CPU_DEFAULTS = tuple(d for d in cpu_platform.CPU_DEFAULTS if d[0][0] != "--transformer-impl")
        allow_on_cpu("--moe-grouped-gemm")
        training.checksums = lambda model: {}  # it does not know the names of grouped experts
        forward_step = training._forward_step

        def own_part_of_sequence(iterator: Any, model: Any) -> Any:
            from megatron.core import parallel_state
            from megatron.core.utils import get_batch_on_this_cp_rank

            group = parallel_state.get_context_parallel_group()
            batch = get_batch_on_this_cp_rank(next(iterator), is_hybrid_cp=False, cp_group=group)
            return forward_step(iter([batch]), model)

        training._forward_step = own_part_of_sequence

    def result(self, run: Run) -> Any:
        """Return kind, global shape and scattering of every monitored layer of this rank."""
        views = self.monitor._meter._weight_views
        return {view.name: (view.kind, view.rows[0].fan_in, view.scattered) for view in views}


LAYOUTS = {
    "one": (LLAMA, 1, 1, 1, ()),
    "tp2": (LLAMA, 2, 1, 1, TP2),
    "tp2-sp": (LLAMA, 2, 1, 1, (*TP2, *SP)),
    "dp2-distributed": (LLAMA, 2, 2, 1, DISTRIBUTED),
    "pp2": (LLAMA, 2, 1, 1, PP2),
    "cp2": (LLAMA, 2, 1, 2, CP2),
    "cp2-distributed": (LLAMA, 2, 1, 2, (*CP2, *DISTRIBUTED)),
    "tp2-sp-cp2": (LLAMA, 4, 1, 2, (*TP2, *SP, *CP2)),
    "gpt-tp2-sp": (GPT, 2, 1, 1, (*TP2, *SP)),
    "moe-grouped": (MIXTURE, 1, 1, 1, GROUPED),
    "moe-grouped-ep2": (MIXTURE, 2, 2, 1, (*GROUPED, *EP2)),
    "moe-grouped-tp2-sp": (MIXTURE, 2, 1, 1, (*GROUPED, *TP2, *SP)),
    "moe-grouped-dp2-distributed": (MIXTURE, 2, 2, 1, (*GROUPED, *DISTRIBUTED)),
    "moe-sequential": (MIXTURE, 1, 1, 1, ()),
    "mla": (LATENT, 1, 1, 1, ()),
    "mla-tp2-sp": (LATENT, 2, 1, 1, (*TP2, *SP)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_metric_of_the_te_spec_is_that_of_full_matrices(pool: Pool, tmp_path: Path, layout: str) -> None:
    model, ranks, data_ranks, context_ranks, flags = LAYOUTS[layout]
    argv = [*TINY, *model.flags(), "--transformer-impl", "transformer_engine", *flags]
    hooks = WithTE(str(tmp_path), spectral=1, tokens=SAMPLED)
    pool.run(train, ranks=ranks, argv=argv, steps=STEPS, hooks=hooks, env={"NVTE_FLASH_ATTN": "0"})
    lines = {as_local_spec(key): line for key, line in read_lines(tmp_path).items()}
    worst = differences(model, lines, data_ranks, context_ranks)
    assert max(worst[metric][0] for metric in METRICS) < 1e-5, worst
    assert worst["top_singular_value"][0] < 1e-3, worst


def as_local_spec(key: tuple[int, str]) -> tuple[int, str]:
    """Return iteration and layer of a line with the name the local layer spec has for it."""
    iteration, layer = key
    name, slash, part = layer.partition("/")
    return iteration, local_spec_name(name).removesuffix(".weight") + slash + part
