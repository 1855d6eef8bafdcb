"""Runs Megatron-LM's own unit tests on CPU twice, without and with megatron_patch's hooks, and compares test by test.

    MEGATRON_LM_DIR=/path/to/Megatron-LM make test-megatron

The checkout should be of the series the package is tested with; core_v0.19.0 was used for docs/compatibility.md. Many
of these tests need a GPU, Transformer Engine or more ranks, and fail or skip in both runs: what counts is that none
changes. Exit code 0: no difference; 1: differences, each printed; 2: cannot run.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
# What the package touches: param groups, scheduler, muP, arguments, optimizers, TP layers, checkpoints, the trainer.
ONE_RANK = """
    test_optimizer_param_scheduler.py test_optimizer.py test_lion_optimizer.py optimizer transformer/test_mup.py
    transformer/test_transformer_config.py transformer/test_module.py
    test_argument_utils.py test_num_microbatches_calculator.py test_parallel_state.py test_process_groups_config.py
    test_checkpointing.py test_training.py test_activation_logging.py test_start_eval_at_iter.py
    test_eval_batch_size.py test_local_multi_tensor_fns.py test_utils.py test_typed_torch.py tensor_parallel
    distributed/test_param_layout.py distributed/test_layer_wise_param_layout.py
    distributed/test_finalize_model_grads.py dist_checkpointing/test_mapping.py dist_checkpointing/test_strict.py
    dist_checkpointing/test_safe_globals.py dist_checkpointing/test_validation.py
    training/test_train_step_schedule_plumbing.py training/test_param_norm.py
""".split()
RUNS: tuple[tuple[int, Sequence[str]], ...] = ((1, ONE_RANK),)
SECONDS_PER_TEST = 300
SECONDS_PER_RUN = 3600
# The worst of a test that has several, such as a passed call and a failed tear-down, or one for each rank.
ORDER = ("passed", "skipped", "failed", "error", "collection skipped", "collection failed")


def outcomes(checkout: Path, hooks: bool, ranks: int, files: Sequence[str]) -> dict[str, str]:
    """Run `files` below tests/unit_tests on so many ranks; return the outcome of every test that was reached."""
    with tempfile.TemporaryDirectory(prefix="megatron-suite-") as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        processes = []
        for rank in range(ranks):
            environment = os.environ | {
                "MEGATRON_SUITE_HOOKS": str(int(hooks)),
                "MEGATRON_SUITE_OUTCOMES": f"{folder}/outcomes{rank}",
                "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent.parent)]),
                "PYTHONDONTWRITEBYTECODE": "1",  # the checkout stays as it is
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "GLOO_SOCKET_IFNAME": "lo",
                "OMP_NUM_THREADS": "1",
            }
            plugins = "-p megatron_suite_plugin -p no:cacheprovider --continue-on-collection-errors"
            words = f"-m pytest -o addopts= -q {plugins} --basetemp {folder}/{rank} --timeout {SECONDS_PER_TEST}"
            command = [sys.executable, *words.split()]
            with open(f"{folder}/printed{rank}", "w", encoding="utf-8") as printed:
                processes.append(
                    subprocess.Popen(
                        [*command, *(f"tests/unit_tests/{file}" for file in files)],
                        cwd=checkout,
                        env=environment,
                        stdout=printed,
                        stderr=subprocess.STDOUT,
                    )
                )
        for process in processes:
            try:
                process.wait(SECONDS_PER_RUN)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        found: dict[str, str] = {}
        for rank, process in enumerate(processes):
            path = Path(folder) / f"outcomes{rank}"
            if process.returncode not in (0, 1, 2) or not path.exists():
                end = (Path(folder) / f"printed{rank}").read_text(errors="replace")[-2000:]
                print(f"rank {rank} ended with exit code {process.returncode}:\n{end}", file=sys.stderr)
            for line in path.read_text().splitlines() if path.exists() else ():
                note = json.loads(line)
                found[note["test"]] = max(found.get(note["test"], "passed"), note["outcome"], key=ORDER.index)
        return found


def differences(plain: Mapping[str, str], patched: Mapping[str, str]) -> list[str]:
    """Return one line for every test whose outcomes differ.

    >>> differences({"a": "passed", "b": "failed"}, {"a": "failed", "b": "failed"})
    ['a: passed without, failed with the hooks']
    """
    return [
        f"{test}: {plain.get(test, 'not reached')} without, {patched.get(test, 'not reached')} with the hooks"
        for test in sorted({*plain, *patched})
        if plain.get(test) != patched.get(test)
    ]


def file_of(test: str) -> str:
    """The file a test is in, below tests/unit_tests."""
    return test.partition("::")[0].removeprefix("tests/unit_tests/")


def table(ranks: int, plain: Mapping[str, str], changed: Sequence[str]) -> list[str]:
    """Return the lines of a Markdown table: a row for each file, and the sum."""
    rows: dict[str, Counter[str]] = {}
    for test, outcome in plain.items():
        for row in (file_of(test), "sum"):
            rows.setdefault(row, Counter())[outcome.replace("collection ", "")] += 1
    lines = [
        "| file | ranks | passed | failed | error | skipped | different with the hooks |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in [*sorted(rows.keys() - {"sum"}), *(rows.keys() & {"sum"})]:
        numbers = [rows[name][kind] for kind in ("passed", "failed", "error", "skipped")]
        other = sum(name == "sum" or file_of(line) == name for line in changed)
        lines.append(f"| {name} | {ranks} | {' | '.join(map(str, numbers))} | {other} |")
    return lines


def main() -> int:
    """Compare, print, and return the exit code."""
    checkout = Path(os.environ.get("MEGATRON_LM_DIR") or "/nonexistent").resolve()
    if not (checkout / "tests" / "unit_tests").is_dir():
        print(
            f"error: MEGATRON_LM_DIR {os.environ.get('MEGATRON_LM_DIR') or 'not given'}: expected a checkout of "
            "Megatron-LM with its tests; git clone --branch core_v0.19.0 https://github.com/NVIDIA/Megatron-LM",
            file=sys.stderr,
        )
        return 2
    changed_at_all, passed = [], 0
    for ranks, files in RUNS:
        plain, patched = (outcomes(checkout, hooks, ranks, files) for hooks in (False, True))
        changed = differences(plain, patched)
        print(*table(ranks, plain, changed), "", sep="\n", flush=True)
        print(*changed, sep="\n", end="\n" if changed else "", flush=True)
        changed_at_all += changed
        passed += sum(outcome == "passed" for outcome in plain.values())
    if not passed:
        print("error: no test passed even without the hooks", file=sys.stderr)
        return 2
    return 1 if changed_at_all else 0


if __name__ == "__main__":
    sys.exit(main())
