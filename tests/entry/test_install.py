"""`megatron_patch.install()`: the same training as under `run`, from a user's own script, and nothing left behind."""

import argparse
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

import megatron_patch
from megatron_patch.errors import UpstreamChanged
from megatron_patch.upstream.cpu import platform as cpu_platform
from megatron_patch.upstream.cpu.platform import cpu_arguments
from tests.support.commands import commands
from tests.support.pool import ROOT, Pool
from tests.support.symbols import ENTRY, symbols
from tests.support.training import TINY, Hooks, Run, train

SQRT = ["--width-scaling", "sqrt", "--base-hidden-size", "8"]
METRICS = ["--alignment-interval", "2"]

# A script as users write them: it imports Megatron by name, defines a model's data and loss, and calls pretrain.
OWN_SCRIPT = """
    {before}
    import sys
    sys.path.insert(0, {root!r})
    from megatron.core.enums import ModelType
    from megatron.training import get_args, pretrain
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args
    from tests.support.training import _datasets, _forward_step

    def main():
        args = parse_and_validate_args()
        config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
        pretrain(config, _datasets, ModelType.encoder_or_decoder, _forward_step)

    {call}
"""


def losses(text: str) -> list[str]:
    """The losses in Megatron's log, as it prints them."""
    return [part.split(":")[1].strip() for line in text.splitlines() for part in line.split("|") if "lm loss:" in part]


def write_script(path: Path, before: str = "", call: str = "main()") -> None:
    path.write_text(textwrap.dedent(OWN_SCRIPT).format(root=str(ROOT), before=before, call=call))


def test_a_script_that_installs_trains_as_under_run(pool: Pool, tmp_path: Path) -> None:
    """In a process of its own, without the pool: from the bare interpreter to the last loss."""
    write_script(tmp_path / "plain.py")
    write_script(tmp_path / "own.py", "import megatron_patch", "with megatron_patch.install(): main()")
    flags = [*TINY, "--train-iters", "4", *SQRT, *METRICS]
    own = subprocess.run(
        [sys.executable, "own.py", "--cpu", *flags, "--metrics-dir", "own"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert own.returncode == 0, own.stderr[-3000:]
    argv = ["plain.py", "--cpu", *flags, "--metrics-dir", "run"]
    (under_run,) = pool.run(commands, distributed=False, argvs=[argv], cwd=str(tmp_path))[0]
    assert (under_run.error, under_run.code) == ("", 0)
    assert len(losses(own.stdout)) == 4
    assert losses(own.stdout) == losses(under_run.out)
    for name in ("alignment.jsonl", "hyperparameters.json"):
        assert (tmp_path / "own" / name).read_text() == (tmp_path / "run" / name).read_text()
    assert json.loads((tmp_path / "own" / "run.json").read_text())["arguments"]["cpu"] is True
    assert own.stdout.count("--cpu sets --distributed-backend gloo") == 1


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, megatron_patch; print([m for m in ('torch', 'megatron', 'yaml', 'numpy') if m in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout == "[]\n"


# --- undo ------------------------------------------------------------------------------------------------------------


def changed_since(before: dict[str, Any]) -> set[str]:
    after = symbols()
    return {name for name, value in before.items() if after.get(name) is not value}


def pretrain_once(flags: list[str]) -> None:
    """What OWN_SCRIPT does, in this process."""
    from megatron.core.enums import ModelType
    from megatron.training import training
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    from tests.support.training import _datasets, _forward_step

    sys.argv = ["own.py", "--cpu", *cpu_arguments([*TINY, *flags])[0]]
    args = parse_and_validate_args()
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    training.pretrain(config, _datasets, ModelType.encoder_or_decoder, _forward_step)


def trained_inside_the_block(flags: list[str]) -> tuple[set[str], set[str]]:
    """In a worker: what is another object inside the block, after a training, and what after it."""
    before = symbols()
    with megatron_patch.install():
        pretrain_once(flags)
        inside = changed_since(before)
    return inside, changed_since(before)


def test_after_the_block_every_symbol_is_the_original(pool: Pool) -> None:
    ((inside, after),) = pool.run(trained_inside_the_block, flags=["--train-iters", "2", *SQRT], distributed=False)
    assert inside > ENTRY
    assert "megatron.training.training:get_megatron_optimizer" in inside, "the flags installed nothing"
    assert not {name for name in after if name in ENTRY or name.startswith("megatron.")}


def undone_and_done_again(how: str) -> tuple[list[set[str]], list[str]]:
    """In a worker: twice install, parse our flags, undo; what is changed after each, and what the parser then knows."""
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
    from megatron.training import arguments, global_vars

    before, changed, known = symbols(), [], []
    for _ in range(2):
        patch = megatron_patch.install()
        sys.argv = ["own.py", *cpu_arguments([*TINY, "--train-iters", "1", *SQRT])[0]]
        arguments.parse_and_validate_args()
        changed.append(changed_since(before))
        megatron_patch.uninstall() if how == "uninstall" else patch.remove()
        patch.remove()  # twice is harmless
        changed.append(changed_since(before))
        parser = arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
        known.append("--width-scaling" in parser._option_string_actions)
        global_vars.destroy_global_vars()
        unset_num_microbatches_calculator()
    return changed, known


@pytest.mark.parametrize("how", ["uninstall", "remove"])
def test_undone_it_can_be_installed_again(pool: Pool, how: str) -> None:
    ((changed, known),) = pool.run(undone_and_done_again, how=how)
    assert changed[0] == changed[2]
    assert changed[0] > ENTRY
    assert changed[1] == changed[3] == set()
    assert known == [False, False]


class ReplacedOnTop(Hooks):
    """tests/support/training.py puts its own functions on top of ours, as a user's code may."""

    def before_arguments(self) -> None:
        self.patch = megatron_patch.install()

    def result(self, run: Run) -> tuple[str, bool]:
        from megatron.training import arguments

        try:
            self.patch.remove()
        except UpstreamChanged as error:
            return str(error), hasattr(arguments.validate_args, "_megatron_patch")
        return "", False


def test_what_somebody_replaced_on_top_is_not_undone(pool: Pool) -> None:
    outcome = pool.run(train, argv=[*TINY, *SQRT], steps=1, hooks=ReplacedOnTop())[0]
    assert outcome.extra == (
        "megatron.training.training:training_log was replaced again after megatron_patch; undo that first",
        True,  # all or nothing
    )


# --- errors are exceptions -------------------------------------------------------------------------------------------


def mistakes() -> dict[str, str]:
    """In a worker: what each mistake raises."""
    from megatron.training import arguments

    found = {}

    def note(name: str, attempt: Any, *argv: str) -> None:
        sys.argv = ["own.py", *argv]
        try:
            attempt()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"

    note("nothing to undo", megatron_patch.uninstall)
    patch = megatron_patch.install()
    note("twice", megatron_patch.install)
    note("flags", arguments.parse_and_validate_args, *cpu_arguments([*TINY, "--width-scaling", "sqrt"])[0])
    note("yaml", arguments.parse_args, "--yaml-cfg", "x.yaml", "--width-scaling", "sqrt")
    note("a GPU's flag", arguments.parse_args, "--fp8-format", "hybrid")
    patch.remove()
    cpu_platform.activate().deactivate()
    before = symbols()
    with megatron_patch.install():
        note("--cpu too late", arguments.parse_args, "--cpu")
    with megatron_patch.install(cpu=True):
        sys.argv = ["own.py"]
        found["cpu"] = str((arguments.parse_args().cpu, arguments.parse_args().distributed_backend))
        found["active"] = str(cpu_platform.is_active())
    sys.argv = ["own.py", "--cpu"]
    with megatron_patch.install():
        found["active by flag"] = str(cpu_platform.is_active())
    found["active after"] = str(cpu_platform.is_active())
    import megatron.core

    megatron.core.__version__ = "0.20.1"
    note("version", lambda: megatron_patch.install(cpu=True))
    found["left"] = str(sorted(changed_since(before))) + str(cpu_platform.is_active())
    megatron_patch.install(allow_untested_megatron=True).remove()
    sys.argv = ["own.py", "--allow-untested-megatron"]
    megatron_patch.install().remove()
    return found


def test_mistakes_raise(pool: Pool) -> None:
    (found,) = pool.run(mistakes, distributed=False)
    assert found["nothing to undo"] == (
        "MegatronPatchError: megatron_patch is not installed in this process: there is nothing to undo"
    )
    assert found["twice"].startswith("MegatronPatchError: megatron_patch is installed already in this process: call")
    assert found["flags"].startswith("ConfigError: --base-hidden-size not given: expected")
    assert found["yaml"].startswith("ConfigError: --yaml-cfg with --width-scaling: expected no flag beside it")
    assert found["a GPU's flag"].startswith("ConfigError: --fp8-format hybrid: expected no such flag with --cpu")
    assert found["--cpu too late"] == (
        "ConfigError: --cpu given: expected the CPU platform switched on before Megatron is imported; call "
        "megatron_patch.install(cpu=True)"
    )
    assert (found["cpu"], found["active"], found["active by flag"]) == ("(True, 'gloo')", "True", "True")
    assert found["active after"] == "False"
    assert found["version"].startswith("UpstreamChanged: megatron-core 0.20.1: megatron_patch is tested with 0.19 only")
    assert found["left"] == "[]False"


def test_installing_under_run_is_refused(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("import megatron_patch\nmegatron_patch.install()\n")
    (ended,) = pool.run(commands, distributed=False, argvs=[["own.py"]], cwd=str(tmp_path))[0]
    assert (ended.code, ended.error) == (2, "")
    assert ended.err.startswith("error: megatron.training.arguments:add_megatron_arguments is hooked already: install")
