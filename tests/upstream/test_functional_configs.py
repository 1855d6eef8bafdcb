"""The argument sets of Megatron-LM's functional tests through `explain`, with a width rule and metrics.

Runs where MEGATRON_LM_DIR names a checkout of Megatron-LM core_v0.19.0. The table in docs/compatibility.md is what

    MEGATRON_LM_DIR=... python -m tests.upstream.test_functional_configs

prints.
"""

import os
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.support.explaining import explained
from tests.support.functional_configs import FAMILIES, Functional, argument_sets, example
from tests.support.pool import Pool

CHECKOUT = os.environ.get("MEGATRON_LM_DIR", "")
pytestmark = pytest.mark.skipif(not CHECKOUT, reason="MEGATRON_LM_DIR is not set: no functional test's arguments")

# Why an argument set is not explained as it is: the flag that the refusal names, and what is behind it. Those of the
# first are refused with metrics only; each is in the feature table of docs/compatibility.md.
WITHOUT_METRICS = {
    "--use-megatron-fsdp": "FSDP",
    "--use-torch-fsdp2": "FSDP",
    "--mtp-num-layers": "multi-token prediction",
    "--cuda-graph-impl": "CUDA graphs",
    "--enable-cuda-graph": "CUDA graphs",
    "--external-cuda-graph": "CUDA graphs",
    "--use-transformer-engine-op-fuser": "Transformer Engine's op fuser",
    "--num-distributed-optimizer-instances": "several distributed-optimizer instances",
    "--moe-shared-expert-overlap": "shared experts on a stream of their own",
    "--overlap-moe-expert-parallel-comm": "two microbatches at a time",
    "--moe-pad-expert-input-to-capacity": "padded experts",
    "--moe-router-padding-for-quantization": "padded experts",
    "--moe-single-grouped-weight": "one weight for all experts",
}
REFUSED = {
    "--decoupled-lr": "a second rule for the LR of embeddings and LM head",
    "--optimizer": "an optimizer other than AdamW",
    "--optimizer-cpu-offload": "an optimizer on the CPU",
    "--tensor-parallel-num-weight-shards": "weights sharded a second time",
    "Megatron refuses": "refused by Megatron itself, in its words",
}


# How the examples end: explained, or refused for the flag that is named.
EXAMPLES_END = {
    "llama/train_llama3_8b_h100_fp8.sh": "--decoupled-lr 0.0005: expected no second rule for the LR of embeddings",
    "mixtral/train_mixtral_8x7b_distributed.sh": "",
    "mamba/train.sh": "",
    "gptoss/02_train.sh": "",
    "megatron_fsdp/train_llama3_8b_fsdp_h100_fp8.sh": "--use-megatron-fsdp True: expected no FSDP, whose shards are",
    "megatron_fsdp/sbatch_mfsdp_deepseek_v3.sh": "--use-megatron-fsdp True: expected no FSDP, whose shards are",
}


def command(one: Functional, *more: str) -> list[str]:
    ranks = [] if one.ranks is None else ["--world-size", str(one.ranks)]
    rule, base = "sqrt", str(one.hidden_size // 4)
    if "--use-mup" in one.words:  # which is a rule itself; ours adds the weight decay
        rule, base = "independent", one.words[one.words.index("--mup-base-hidden-size") + 1]
    rule_flags = ["--width-scaling", rule, "--base-hidden-size", base]
    return ["--ignore-unknown", "--json", *one.words, *rule_flags, *ranks, *more]


def reason(error: str, known: dict[str, str]) -> str | None:
    text = error.removeprefix("error: ")
    return next((why for start, why in known.items() if re.match(rf"{re.escape(start)}\b", text)), None)


def outcomes(pool: Pool) -> dict[str, tuple[str, str]]:
    """By name: how far the argument set gets (explained, rules only, refused), and why no further."""
    found = {}
    sets = argument_sets(Path(CHECKOUT))
    measured = explained(pool, [command(one, "--alignment-interval", "100") for one in sets])
    again = [one for one, ended in zip(sets, measured, strict=True) if ended.code]
    ruled = dict(zip((one.name for one in again), explained(pool, [command(one) for one in again]), strict=True))
    for one, ended in zip(sets, measured, strict=True):
        rules = ruled.get(one.name)
        if rules is None:
            found[one.name] = ("explained", "")
        elif rules.code == 0:
            found[one.name] = ("rules only", reason(ended.err, WITHOUT_METRICS) or ended.err.strip())
        else:
            found[one.name] = ("refused", reason(rules.err, REFUSED) or rules.err.strip())
    return found


def test_every_argument_set_is_explained_or_refused_for_a_known_reason(pool: Pool) -> None:
    found = outcomes(pool)
    families = Counter(name.partition("/")[0] for name in found)
    assert set(families) == set(FAMILIES)
    known = {"", *WITHOUT_METRICS.values(), *REFUSED.values()}
    assert {name: outcome for name, outcome in found.items() if outcome[1] not in known} == {}
    assert Counter(kind for kind, _ in found.values())["explained"] > 0.7 * len(found)


@pytest.mark.parametrize(("script", "why"), EXAMPLES_END.items())
def test_examples_are_explained_or_refused_by_flag(script: str, why: str, pool: Pool, tmp_path: Path) -> None:
    """With metrics; without them, DeepSeek v3's is explained."""
    words = example(Path(CHECKOUT), script, tmp_path)
    one = Functional(script, tuple(words), int(words[words.index("--hidden-size") + 1]), None)
    ended, rules = explained(pool, [command(one, "--alignment-interval", "100"), command(one)])
    assert (rules.code == 0) == ("llama" not in script), rules.err
    lines = ended.err.splitlines()
    assert ended.code == (2 if why else 0), ended.err
    assert all(line.startswith("error: --") for line in lines), ended.err  # a line for each flag
    assert "".join(lines).startswith(f"error: {why}") if why else not lines


if __name__ == "__main__":
    from contextlib import closing

    with closing(Pool()) as own:
        table = outcomes(own)
    print("| family | explained | rules only | refused |\n|---|---|---|---|")
    for family in FAMILIES:
        of_family = [outcome for name, outcome in table.items() if name.startswith(f"{family}/")]
        cells = [str(sum(kind == "explained" for kind, _ in of_family))]
        for wanted in ("rules only", "refused"):
            reasons = Counter(why for kind, why in of_family if kind == wanted)
            cells.append("; ".join(f"{count}: {why}" for why, count in reasons.most_common()) or "-")
        print(f"| {family} | {' | '.join(cells)} |")
    sys.exit(0)
