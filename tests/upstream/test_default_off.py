"""Installed and not asked for anything, the patch changes nothing: not a bit, not a default, not a file."""

import re
import sys
from pathlib import Path

import pytest

from megatron_patch.upstream.flags import add_arguments
from tests.support.pool import Pool
from tests.support.symbols import ENTRY, symbols
from tests.support.training import TINY, Hooks, Outcome, Patched, Run, train

LAYOUTS = {
    "tensor parallel": ["--tensor-model-parallel-size", "2"],
    "distributed optimizer": ["--use-distributed-optimizer"],
}
# Every rule at width 1 asks for all the hooks and gives every parameter the factor 1.
IDENTITY = "--width-scaling sqrt --base-hidden-size 32 --extra-warmup decay-away --scale-adam-eps".split()


class Settings(Hooks):
    """Brings back the validated arguments as text."""

    def result(self, run: Run) -> dict[str, str]:
        return {name: repr(value) for name, value in vars(run.args).items()}


class PatchedSettings(Patched, Settings):
    """The same with the patch installed as `megatron_patch run` installs it."""


def our_names() -> set[str]:
    import argparse

    return set(vars(add_arguments(argparse.ArgumentParser()).parse_args([])))


def bits(outcome: Outcome) -> tuple[list[str], list[str], dict[str, str]]:
    """All that training computed, to the last bit."""
    digests = {name: checksum.digest for name, checksum in outcome.checksums.items()}
    return [x.hex() for x in outcome.losses], [x.hex() for x in outcome.grad_norms], digests


@pytest.mark.parametrize("layout", LAYOUTS)
def test_twenty_iterations_are_the_same_to_the_last_bit(pool: Pool, layout: str, tmp_path: Path) -> None:
    def trained(where: str, hooks: Hooks, *flags: str) -> Outcome:
        written = [
            "--save",
            f"{tmp_path}/{where}",
            "--save-interval",
            "20",
            "--tensorboard-dir",
            f"{tmp_path}/{where}/tb",
        ]
        argv = [*TINY, *LAYOUTS[layout], *written, *flags]
        outcomes = pool.run(train, ranks=2, argv=argv, steps=20, hooks=hooks)
        assert bits(outcomes[0]) == bits(outcomes[1])
        result: Outcome = outcomes[0]
        return result

    stock = trained("stock", Settings())
    assert len(stock.losses) == 20
    assert stock.losses[-1] < stock.losses[0] - 0.1, "nothing is learned: a broken optimizer would go unnoticed"
    patched = trained("patched", PatchedSettings())
    assert bits(patched) == bits(stock)

    # Not a setting of Megatron's is another one, and ours are at their defaults.
    settings = {
        name: value.replace(f"{tmp_path}/patched", f"{tmp_path}/stock") for name, value in patched.extra.items()
    }
    assert {name: value for name, value in settings.items() if name not in our_names()} == stock.extra
    assert settings.keys() - stock.extra.keys() == our_names()

    # Not a file more.
    def files(where: str) -> list[str]:
        paths = (str(path.relative_to(tmp_path / where)) for path in (tmp_path / where).rglob("*"))
        return sorted(re.sub(r"tfevents\..*", "tfevents", path) for path in paths)

    assert len(files("stock")) > 5
    assert files("patched") == files("stock")

    # All hooks installed, every factor 1: still the same bits. Without clipping, as the gradients' norm is a sum over
    # the param groups, which may be other ones.
    unclipped = trained("unclipped", Settings(), "--clip-grad", "0")
    identity = trained("identity", PatchedSettings(), *IDENTITY, "--clip-grad", "0")
    assert bits(identity) == bits(unclipped)
    assert (tmp_path / "identity" / "transfer" / "run.json").exists(), "the hooks were not installed"

    # And the comparison can fail: one part in a billion of the learning rate is seen.
    if layout == "tensor parallel":
        assert bits(trained("other", PatchedSettings(), "--lr", "0.010000001")) != bits(stock)


def changed_symbols(flags: list[str]) -> tuple[set[str], int]:
    """In a worker: what is another object after the patch was installed and Megatron validated its flags."""
    from megatron.training.arguments import parse_and_validate_args

    from megatron_patch.upstream.cpu.platform import cpu_arguments

    before = symbols()
    Patched().before_arguments()
    sys.argv = ["train", *cpu_arguments([*TINY, "--train-iters", "1", *flags])[0]]
    parse_and_validate_args()
    after = symbols()
    return {name for name, value in before.items() if after.get(name) is not value}, len(before)


def test_every_symbol_but_the_entries_is_the_original(pool: Pool) -> None:
    ((changed, number),) = pool.run(changed_symbols, flags=[])
    assert number > 10_000
    assert changed == ENTRY
    ((changed, _),) = pool.run(changed_symbols, flags=IDENTITY)
    assert "megatron.training.training:get_megatron_optimizer" in changed, "the comparison sees nothing"


def defaults() -> tuple[dict[str, str], dict[str, str]]:
    """In a worker: what an empty command line means without and with the patch."""
    from megatron.training import arguments

    sys.argv = ["train"]
    without = arguments.parse_args()
    Patched().before_arguments()
    both = without, arguments.parse_args()
    return tuple({name: repr(value) for name, value in vars(each).items()} for each in both)  # type: ignore[return-value]


def test_no_default_of_megatrons_is_changed(pool: Pool) -> None:
    ((without, patched),) = pool.run(defaults, distributed=False)
    assert len(without) > 500
    assert {name: patched[name] for name in without} == without
    assert patched.keys() - without.keys() == our_names()
