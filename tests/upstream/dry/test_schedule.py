"""A schedule that is taken in stretches, as that of a very long run is, against every step of Megatron's scheduler."""

import shlex
from typing import Any

import pytest

from tests.support.building import COMMON, LLAMA_STYLE
from tests.support.explaining import explain_all
from tests.support.pool import Pool

RUN = [*COMMON, *LLAMA_STYLE.split(), *"--ffn-hidden-size 96 --width-scaling sqrt --base-hidden-size 16".split()]
RUN += "--train-iters 4000 --schedule --json".split()
SCHEDULES = {
    "constant": "--lr-decay-style constant",
    "linear": "--lr-decay-style linear --lr-warmup-iters 300",
    "cosine": "--lr-decay-style cosine --lr-warmup-fraction 0.1 --lr-warmup-init 1e-4",
    "inverse-square-root": "--lr-decay-style inverse-square-root --lr-warmup-iters 100",
    "short": "--lr-decay-style linear --lr-decay-iters 1000",
    **{
        f"WSD-{style}": f"--lr-decay-style WSD --lr-wsd-decay-style {style} --lr-wsd-decay-iters 700"
        for style in ("linear", "cosine", "exponential", "minus_sqrt")
    },
    "weight decay": "--start-weight-decay 0.01 --end-weight-decay 0.1 --weight-decay-incr-style cosine",
    "growing batch": "--step-batch-size-schedule '0:2 10000:4 30000:8' --micro-batch-size 1",
}
WARMUPS = {
    "none": "",
    "exp": "--extra-warmup exp --extra-warmup-fraction 0.3",
    "decay-away": "--extra-warmup decay-away",
}


def both(commands: list[list[str]], fine: int) -> list[tuple[Any, Any]]:
    """What explain prints of each command with every step made, and in stretches."""
    from megatron_patch.upstream.dry import schedule

    every = [ended.json for ended in explain_all(commands)]
    schedule.ALL_STEPS, schedule.FINE = 100, fine
    return list(zip(every, [ended.json for ended in explain_all(commands)], strict=True))


@pytest.mark.parametrize("name", SCHEDULES)
def test_stretches_are_what_single_steps_are(name: str, pool: Pool) -> None:
    """LR and factor of exp to the last bit; what is summed up on the way as well as the stretches are fine."""
    run = RUN
    if "--step-batch-size-schedule" in SCHEDULES[name]:  # Megatron takes one of the two
        run = shlex.split(" ".join(RUN).replace("--global-batch-size 2 ", ""))
    commands = [[*run, *shlex.split(SCHEDULES[name]), *warmup.split()] for warmup in WARMUPS.values()]
    (results,) = pool.run(both, distributed=False, commands=commands, fine=50)
    for warmup, (every, some) in zip(WARMUPS, results, strict=True):
        steps = {line["step"]: line for line in every["schedule"]}
        assert list(steps) == list(range(len(steps)))
        assert 0 in steps and len(some["schedule"]) < len(steps) / 5
        assert some["schedule"][-1]["step"] == max(steps)
        exact = warmup != "decay-away"
        for line in some["schedule"]:
            one = steps[line["step"]]
            for key in ("lr", "lr_factor"):
                assert line[key] == pytest.approx(one[key], rel=1e-12 if exact else 1e-3, abs=1e-15), (warmup, key, one)
            update = one["relative_update_prediction"]
            assert line["relative_update_prediction"] == pytest.approx(update, rel=5e-3, abs=1e-6), (warmup, one)


def test_finer_stretches_are_closer(pool: Pool) -> None:
    """The error goes with the square of the length of a stretch."""
    command = [*RUN, *SCHEDULES["cosine"].split(), *WARMUPS["decay-away"].split()]
    errors = []
    for fine in (25, 100):
        ((every, some),) = pool.run(both, distributed=False, commands=[command], fine=fine)[0]
        steps = {line["step"]: line["lr_factor"] for line in every["schedule"]}
        errors.append(max(abs(line["lr_factor"] / steps[line["step"]] - 1) for line in some["schedule"]))
    assert 0 < errors[1] < errors[0] / 8


def test_the_longest_run_of_a_public_example_is_explained_at_once(pool: Pool) -> None:
    """Megatron-LM's Llama 3 8B example: 15.3 million steps by samples. Stepping them took 5.9 GB."""
    words = "--train-samples 1953125000 --lr-decay-samples 1949218748 --lr-warmup-samples 3906252 "
    words += "--global-batch-size 128"
    words = f"{' '.join(RUN)} {words} --lr-decay-style cosine"
    command = words.replace("--train-iters 4000 ", "").replace("--train-iters 100 ", "").split()
    (ended,) = pool.run(explain_all, distributed=False, commands=[command])[0]
    lines = ended.json["schedule"]
    assert lines[-1]["step"] == 1953125000 // 128 - 1
    assert len(lines) < 50_000
    assert lines[-1]["lr"] == pytest.approx(0.001, rel=1e-3)
