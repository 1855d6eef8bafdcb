"""``python -m megatron_patch run``: whole commands, and scripts that cannot tell the difference."""

import argparse
import os
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support.commands import Ended, commands
from tests.support.pool import ROOT, Pool

# What a Megatron script does first; it then shows what it was given.
SHOWS_ARGUMENTS = """
    from megatron.training.arguments import parse_args
    def extra(parser):
        parser.add_argument("--own_flag", type=int, default=0)
        return parser
    args = parse_args(extra)
    print("LR", args.lr, "LAYERS", args.num_layers, "OWN", args.own_flag, "TOKENS", args.alignment_tokens)
"""


def test_yaml_and_command_line_reach_megatrons_parser(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(textwrap.dedent(SHOWS_ARGUMENTS))
    (tmp_path / "good.yaml").write_text("lr: 0.5\nnum_layers: 7\nown_flag: 3\nalignment-tokens: 9\n")
    (tmp_path / "bad.yaml").write_text("lr: 0.5\nnum-layrs: 7\n")
    (tmp_path / "off.yaml").write_text("use-distributed-optimiser: false\n")
    before = sorted(tmp_path.iterdir())
    (good, wins, bad, off, unknown, wrong, both) = pool.run(
        commands,
        distributed=False,
        argvs=[
            ["--config", "good.yaml", "train.py"],
            ["--config", "good.yaml", "train.py", "--lr", "0.25", "--own_flag=4"],
            ["--config", "bad.yaml", "train.py"],
            ["--config", "off.yaml", "train.py"],
            ["train.py", "--num-layrs", "7"],
            ["train.py", "--width-scaling", "cubic"],
            ["train.py", "--yaml-cfg", "x.yaml", "--width-scaling", "sqrt"],
        ],
        cwd=str(tmp_path),
    )[0]
    assert (good.out, good.code) == ("LR 0.5 LAYERS 7 OWN 3 TOKENS 9\n", 0)
    assert (wins.out, wins.code) == ("LR 0.25 LAYERS 7 OWN 4 TOKENS 9\n", 0)
    assert (bad.code, bad.error, bad.out) == (2, "", "")
    assert bad.err == (
        "error: bad.yaml: num-layrs 7: expected a flag of Megatron or of megatron_patch; did you mean num-layers?\n"
    )
    assert off.code == 2
    assert off.err.endswith("did you mean use-distributed-optimizer?\n")
    assert unknown.code == 2
    assert "unrecognized arguments: --num-layrs 7" in unknown.err
    assert wrong.code == 2
    assert "--width-scaling: invalid choice: 'cubic'" in wrong.err
    assert both.code == 2
    assert both.err.startswith("error: --yaml-cfg with --width-scaling: expected no flag beside it")
    assert sorted(tmp_path.iterdir()) == before, "something was written"


def test_help_of_any_script_shows_our_flags(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(textwrap.dedent(SHOWS_ARGUMENTS))
    own, default = pool.run(commands, distributed=False, argvs=[["train.py", "--help"], ["--help"]], cwd=str(tmp_path))[
        0
    ]
    assert own.code == 0
    group = own.out.partition("\nwidth transfer:\n")[2].partition("\n\n")[0]
    assert "--width-scaling" in group
    assert "--alignment-interval" in group
    assert "--num-layers" in own.out
    assert (default.code, default.out.startswith("usage: ")) == (0, True)


def test_without_a_gpu_what_fails_names_cpu(tmp_path: Path) -> None:
    """At the end of the script's own traceback; not where --cpu was given, nor where the script goes well."""
    (tmp_path / "fails.py").write_text("raise ValueError('Found no NVIDIA driver')\n")
    (tmp_path / "works.py").write_text("print('fine')\n")
    said = {
        (script, cpu): subprocess.run(
            [sys.executable, "-m", "megatron_patch", "run", script, *cpu],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        ).stderr
        for script in ("fails.py", "works.py")
        for cpu in ((), ("--cpu",))
    }
    hint = "Found no NVIDIA driver\n(torch sees no CUDA device on this machine: add --cpu to train on CPU with gloo)\n"
    assert {key: text.endswith(hint) for key, text in said.items()} == {
        ("fails.py", ()): True,
        ("fails.py", ("--cpu",)): False,
        ("works.py", ()): False,
        ("works.py", ("--cpu",)): False,
    }


def stock_help() -> str:
    """In a worker: what the help of a script looks like without us."""
    from megatron.training import arguments

    try:
        arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)).format_help()
    except ValueError as error:
        return str(error)
    return ""


def test_megatrons_own_help_is_broken(pool: Pool) -> None:
    """When this fails, Megatron has mended its help text and `mend_help` can go."""
    assert "unsupported format character" in pool.run(stock_help, distributed=False)[0]


def test_mistakes_of_combination_end_the_run_before_it_starts(pool: Pool, tmp_path: Path) -> None:
    """Through Megatron's validation in the project's own script; nothing is written."""
    from tests.support.training import TINY

    save = ["--save", "checkpoints", "--save-interval", "1", "--tensorboard-dir", "tb"]
    ended = pool.run(
        commands,
        distributed=False,
        argvs=[
            ["--cpu", "--mock-data", *TINY, "--train-iters", "1", *save, "--width-scaling", "sqrt"],
            ["--cpu", "--mock-data", *TINY, "--train-iters", "1", *save, "--alignment-interval", "-1"],
            ["--cpu", "--fp8-format", "hybrid"],
        ],
        cwd=str(tmp_path),
    )[0]
    assert [e.code for e in ended] == [2, 2, 2]
    assert [e.error for e in ended] == ["", "", ""]
    lines = [[line for line in e.err.splitlines() if line.startswith("error: ")] for e in ended]
    assert [len(found) for found in lines] == [1, 1, 1]
    assert lines[0][0].startswith("error: --base-hidden-size not given: expected")
    assert lines[1][0].startswith("error: --alignment-interval -1: expected")
    assert lines[2][0].startswith("error: --fp8-format hybrid: expected")
    assert not any("Traceback" in e.err + e.out for e in ended)
    assert list(tmp_path.iterdir()) == []


def test_only_rank_0_speaks(pool: Pool, tmp_path: Path) -> None:
    mistakes = [["--config", "absent.yaml"], ["absent.py"], ["--cpu", "--fp8-format", "hybrid"]]
    for rank in ("0", "1"):
        ended = pool.run(
            commands,
            distributed=False,
            argvs=mistakes,
            cwd=str(tmp_path),
            environment={"RANK": rank, "WORLD_SIZE": "2"},
        )[0]
        assert [e.code for e in ended] == [2, 2, 2]
        spoken = [e.err.count("\n") for e in ended]
        assert spoken == ([1, 1, 1] if rank == "0" else [0, 0, 0])


def test_untested_megatron(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("print('ran')")
    (tmp_path / "f.yaml").write_text("allow_untested_megatron: true")
    ended = pool.run(
        with_other_version,
        distributed=False,
        argvs=[
            ["train.py"],
            ["train.py", "--allow-untested-megatron"],
            ["--config", "f.yaml", "train.py"],
        ],
        cwd=str(tmp_path),
    )[0]
    assert [(e.code, e.out) for e in ended] == [(2, ""), (0, "ran\n"), (0, "ran\n")]
    assert ended[0].err.startswith("error: megatron-core 0.20.1: megatron_patch is tested with 0.19 only; install one")
    assert "--allow-untested-megatron" in ended[0].err


def with_other_version(argvs: Sequence[Sequence[str]], cwd: str) -> list[Ended]:
    """In a worker: the commands beside a Megatron of the future."""
    import megatron.core

    megatron.core.__version__ = "0.20.1"
    return commands(argvs, cwd)


# Everything a script can see of how it was started; the folder's name has a blank.
LOOKS_AROUND = """
    'documented'
    import os, sys, pickle
    from helper import VALUE
    class Own: pass
    assert sys.modules["__main__"].__dict__ is globals()
    assert pickle.loads(pickle.dumps(Own())).__class__ is Own
    print(VALUE, sys.argv, sys.path[0], os.getcwd(), type(__loader__), type(__builtins__), __annotations__)
    print(__name__, __file__, __doc__, __package__, __spec__, __cached__, sorted(k for k in globals() if k[0] == "_"))
"""


def test_scripts_cannot_tell_the_difference(pool: Pool, tmp_path: Path) -> None:
    """The same script started by python itself and through `run` sees the same, wherever it lies and is started."""
    place = tmp_path / "some where"
    place.mkdir()
    (place / "look.py").write_text(textwrap.dedent(LOOKS_AROUND))
    (place / "helper.py").write_text("VALUE = 'from beside the script'")
    (tmp_path / "link.py").symlink_to("some where/look.py")
    cases = [
        (place, "look.py"),
        (tmp_path, "some where/look.py"),
        (place, "../some where/./look.py"),
        (tmp_path, "link.py"),
        (tmp_path, str(place / "look.py")),
    ]
    words = ["--lr", "1", "a b", ""]
    for cwd, script in cases:
        ours = pool.run(commands, distributed=False, argvs=[[script, *words]], cwd=str(cwd))[0][0]
        plain = subprocess.run(
            [sys.executable, script, *words], cwd=cwd, capture_output=True, text=True, check=True, env=os.environ
        )
        assert (ours.out, ours.error, ours.err) == (plain.stdout, "", plain.stderr)


ENDINGS: list[tuple[str, Any, str]] = [
    ("import sys; sys.exit(3)", 3, ""),
    ("import sys; sys.exit()", None, ""),
    ("raise SystemExit('words')", "words", ""),
    ("raise ValueError('its own')", 0, "builtins.ValueError: its own"),
    ("def f():\n    1 / 0\ndef g():\n    f()\ng()", 0, "builtins.ZeroDivisionError: division by zero"),
    ("try:\n    1 / 0\nexcept Exception as e:\n    raise KeyError(3) from e", 0, "builtins.KeyError: 3"),
    ("raise KeyboardInterrupt", 0, "builtins.KeyboardInterrupt: "),
    ("assert False, 'no'", 0, "builtins.AssertionError: no"),
    ("def broken(:", 0, "builtins.SyntaxError: invalid syntax (script.py, line 1)"),
    (
        "import sys\nsys.excepthook = lambda k, e, t: print(k, e, t.tb_lineno, file=sys.stderr)\n0 / 0",
        0,
        "builtins.Zero",
    ),
]


def test_how_a_script_ends_is_how_the_command_ends(pool: Pool, tmp_path: Path) -> None:
    """The same exit code, and the same traceback: nothing of `run` is in it. A script's own excepthook is honoured."""
    for number, (body, _, _) in enumerate(ENDINGS):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "script.py").write_text(body)
    argvs = [[f"{number}/script.py"] for number in range(len(ENDINGS))]
    ended = pool.run(commands, distributed=False, argvs=argvs, cwd=str(tmp_path))[0]
    for e, argv, (_, code, error) in zip(ended, argvs, ENDINGS, strict=True):
        assert e.code == code
        assert e.error.startswith(error)
        if not isinstance(code, str):  # else python prints the words after all is done
            plain = subprocess.run([sys.executable, *argv], cwd=tmp_path, capture_output=True, text=True, check=False)
            assert e.err == plain.stderr


# What lives on after the script's last line, or in other processes.
LIVES_ON = """
    import atexit, multiprocessing, pickle, sys
    class Item:
        def __init__(self, value): self.value = value
    def double(item): return Item(2 * item.value)
    def bye(): print("bye", pickle.loads(pickle.dumps(Item(3))).value, sys.modules["__main__"].__file__ == __file__)
    if __name__ == "__main__":
        atexit.register(bye)
        print(sys.stdin.read())
        with multiprocessing.get_context("spawn").Pool(1) as workers:
            print([item.value for item in workers.map(double, [Item(4), Item(5)])], flush=True)
        sys.exit(3)
"""


def test_what_outlives_a_script(tmp_path: Path) -> None:
    """Real processes: standard input, spawned workers with the script's classes, what runs at exit, the exit code."""
    (tmp_path / "script.py").write_text(textwrap.dedent(LIVES_ON))
    ours, plain = (
        subprocess.run(
            [sys.executable, *words, "script.py"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            input="words from a pipe",
            capture_output=True,
            text=True,
            check=False,
        )
        for words in (["-m", "megatron_patch", "run"], [])
    )
    assert plain.stdout == "words from a pipe\n[8, 10]\nbye 3 True\n"
    assert (ours.stdout, ours.returncode) == (plain.stdout, 3)


def fake_megatron(folder: Path) -> str:
    """Make something that looks like another Megatron in `folder`."""
    (folder / "megatron" / "core").mkdir(parents=True)
    (folder / "megatron" / "core" / "__init__.py").write_text("__version__ = '0.7'")
    return str(folder)


def test_megatron_beside_the_script_is_the_one_that_is_used(tmp_path: Path) -> None:
    """As in a checkout of Megatron-LM, started from anywhere: what python itself would import is what is hooked."""
    (tmp_path / "checkout").mkdir()
    (tmp_path / "checkout" / "train.py").write_text("import megatron.core; print(megatron.core.__version__)")
    fake_megatron(tmp_path / "checkout")
    ended = subprocess.run(
        [sys.executable, "-m", "megatron_patch", "run", "checkout/train.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: megatron-core 0.7: megatron_patch is tested with 0.19 only")


def test_script_that_brings_another_megatron(pool: Pool, tmp_path: Path) -> None:
    """By changing sys.path itself, too late for us: half of each would be a disaster."""
    other = fake_megatron(tmp_path / "other")
    (tmp_path / "late.py").write_text(f"import sys\nsys.path.insert(0, {other!r})\n{textwrap.dedent(SHOWS_ARGUMENTS)}")
    (tmp_path / "last.py").write_text(f"import sys\nsys.path.append({other!r})\n{textwrap.dedent(SHOWS_ARGUMENTS)}")
    late, last = pool.run(
        commands, distributed=False, argvs=[["late.py", "--lr", "1"], ["last.py", "--lr", "1"]], cwd=str(tmp_path)
    )[0]
    assert (late.code, late.out, late.error) == (2, "", "")
    assert late.err.startswith(f"error: the script has put the Megatron in {other} first on sys.path")
    assert late.err.endswith(f"start with PYTHONPATH={other} instead\n")
    assert (last.code, last.out.split()[:2]) == (0, ["LR", "1.0"])


def test_flags_that_the_script_never_has_checked(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("print('done')")
    ours, none, yaml = pool.run(
        commands,
        distributed=False,
        argvs=[
            ["own.py", "--width-scaling", "sqrt", "--base-hidden-size", "8"],
            ["own.py", "--width-scaling", "none", "--lr", "1"],
            ["own.py", "--yaml-cfg", "x.yaml"],
        ],
        cwd=str(tmp_path),
    )[0]
    assert (ours.code, ours.out) == (2, "done\n")
    assert ours.err.startswith(
        "error: SCRIPT.py own.py: expected a script that has its arguments checked by Megatron's"
    )
    assert (none.code, none.out, none.err) == (0, "done\n", "")
    assert (yaml.code, yaml.out) == (0, "done\n")
    assert yaml.err.startswith("warning: --yaml-cfg is broken in Megatron itself")


# Its own loop out of Megatron's pieces, all imported by name before any flag is known, here and in a module beside it.
PIECES = """
    from megatron.core.enums import ModelType
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.initialize import initialize_megatron
    from megatron.training.training import get_megatron_optimizer_config
    import pieces

    def extra(parser):
        parser.add_argument("--own-flag", type=int, default=0)
        return parser

    args = parse_and_validate_args(extra, args_defaults={"weight_decay": 0.25})
    initialize_megatron()
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model, optimizer, _ = pieces.setup(ModelType.encoder_or_decoder, cfg_container=config, pg_collection=groups)
    again = get_megatron_optimizer(get_megatron_optimizer_config(args)[0], model)
    for each in (optimizer, again):
        print("GROUPS", args.own_flag, sorted((g["max_lr"], g["wd_mult"]) for g in each.param_groups))
"""


def test_script_built_on_megatrons_pieces(pool: Pool, tmp_path: Path) -> None:
    from tests.support.training import TINY

    (tmp_path / "own.py").write_text(textwrap.dedent(PIECES))
    (tmp_path / "pieces.py").write_text("from megatron.training.training import setup_model_and_optimizer as setup")
    base = ["own.py", "--cpu", *TINY, "--train-iters", "1", "--own-flag", "5"]
    rule = "--width-scaling sqrt --base-hidden-size 8 --untie-embeddings-and-output-weights".split()
    plain, scaled = pool.run(commands, distributed=False, argvs=[base, [*base, *rule]], cwd=str(tmp_path))[0]
    assert (plain.error, scaled.error) == ("", ""), plain.err + scaled.err
    found = [[line for line in e.out.splitlines() if line.startswith("GROUPS")] for e in (plain, scaled)]
    # A width 4 times the base's: half the LR and twice the weight decay, but for embeddings, gains and biases.
    assert found[0] == ["GROUPS 5 [(0.01, 0.0), (0.01, 1.0)]"] * 2
    assert found[1] == ["GROUPS 5 [(0.005, 2.0), (0.01, 0.0), (0.01, 1.0)]"] * 2


def test_commands_without_megatron(tmp_path: Path) -> None:
    """`python -m megatron_patch` itself, in processes of its own: usage, exit codes, nothing on the wrong stream."""

    def start(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "megatron_patch", *argv],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
            capture_output=True,
            text=True,
            check=False,
        )

    for argv in (["run"], ["run", "-h"], ["run", "--help"]):
        ended = start(*argv)
        assert (ended.returncode, ended.stdout.startswith("usage: "), ended.stderr) == (0, True, "")
    ended = start("run", "absent.py")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: SCRIPT.py absent.py: expected an existing Python file")
    ended = start("run", "absent.py", RANK="1")
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", "")
    assert list(tmp_path.iterdir()) == []
