"""The off-line kit: packed in pieces, unpacked into a new environment without a registry, checked; a small kit."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.support.pool import ROOT

KIT, UNPACK = ROOT / "tools" / "gpu_kit.sh", ROOT / "tools" / "gpu_kit_unpack.sh"
PIECE = 60 * 2**20


def bash(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", *map(str, words)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


def wheel(folder: Path, name: str, version: str, ballast: int) -> None:
    """Write a wheel of one module, with some bytes that cannot be compressed beside it."""
    files = {
        f"{name}.py": f'version = "{version}"\n'.encode(),
        f"{name}_ballast.bin": os.urandom(ballast),
        f"{name}-{version}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{name}-{version}.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = f"{name}-{version}.dist-info/RECORD"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
        archive.writestr(record, "".join(f"{path},,\n" for path in [*files, record]))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kit of two wheels, packed."""
    folder = tmp_path_factory.mktemp("kit")
    (folder / "kit" / "wheels").mkdir(parents=True)
    wheel(folder / "kit" / "wheels", "small_thing", "1.2", 10)
    wheel(folder / "kit" / "wheels", "large_thing", "3.0", PIECE + 1000)
    (folder / "kit" / "requirements.txt").write_text("large-thing==3.0\nsmall-thing==1.2\n")
    (folder / "kit" / "torch_version").write_text("2.11.0\n")
    done = bash(KIT, folder / "out", "--pack", folder / "kit")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 pieces, ")
    return folder / "out"


@pytest.fixture
def copied(packed: Path, tmp_path: Path) -> Path:
    """The kit on the other machine."""
    return Path(shutil.copytree(packed, tmp_path / "kit"))


def test_pieces_are_small_and_all_there(packed: Path) -> None:
    names = sorted(path.name for path in packed.iterdir())
    assert names == ["SHA256SUMS", "kit.tar.000", "kit.tar.001", "unpack.sh"]
    assert max(path.stat().st_size for path in packed.iterdir()) <= PIECE
    assert sum(path.stat().st_size for path in packed.iterdir()) > PIECE


def test_it_unpacks_into_a_new_environment_without_a_registry(copied: Path, tmp_path: Path) -> None:
    here = sys.executable
    # A proxy that is not there: whatever asked for a registry would fail.
    done = bash(
        copied / "unpack.sh", tmp_path / "venv", PYTHON=here, https_proxy="http://127.0.0.1:9", PIP_INDEX_URL=""
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert "everything is there" in done.stdout
    code = "import large_thing, small_thing, torch; print(large_thing.version, small_thing.version, torch.__file__)"
    venv = subprocess.run(
        [tmp_path / "venv" / "bin" / "python", "-c", code], capture_output=True, text=True, check=True
    )
    assert venv.stdout.split()[:2] == ["3.0", "1.2"]
    assert venv.stdout.split()[2].startswith(sysconfig.get_paths()["purelib"])
    assert not list(tmp_path.glob("tmp.*")), "the unpacked kit was left behind"
    again = bash(copied / "unpack.sh", tmp_path / "venv", PYTHON=here)
    assert (again.returncode, again.stderr.startswith("error: VENV")) == (2, True)


@pytest.mark.parametrize("damage", ["byte", "missing piece", "short piece", "script"])
def test_a_damaged_kit_is_refused(copied: Path, tmp_path: Path, damage: str) -> None:
    piece = copied / "kit.tar.001"
    if damage == "byte":
        content = bytearray(piece.read_bytes())
        content[500] ^= 1
        piece.write_bytes(content)
    elif damage == "missing piece":
        piece.unlink()
    elif damage == "short piece":
        os.truncate(piece, piece.stat().st_size - 1)
    else:
        with open(copied / "unpack.sh", "a", encoding="utf-8") as file:
            file.write("# \n")
    done = bash(copied / "unpack.sh", tmp_path / "venv", PYTHON=sys.executable)
    assert done.returncode == 2
    assert f"error: the kit in {copied}: expected the files of SHA256SUMS; copy them again" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_a_kit_that_lacks_what_it_lists_fails(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "kit" / "wheels").mkdir(parents=True)
    (tmp_path / "kit" / "requirements.txt").write_text("not-there==1.0\n")
    (tmp_path / "kit" / "torch_version").write_text("2.11.0\n")
    assert bash(KIT, tmp_path / "out", "--pack", tmp_path / "kit").returncode == 0
    done = bash(tmp_path / "out" / "unpack.sh", tmp_path / "venv", PYTHON=sys.executable)
    assert done.returncode != 0
    assert "not-there" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([KIT, ROOT], "expected a folder that is not there yet"),
        ([KIT, "new-folder", "--with-te"], "--with-te: expected --without-te or --pack KIT"),
        ([UNPACK, ROOT], "expected a folder that is not there yet"),
        ([UNPACK, "new-folder", "--with-te"], "--with-te: expected --without-te"),
    ],
)
def test_mistakes_are_one_line(words: list[object], said: str) -> None:
    done = bash(*words)
    assert done.returncode == 2
    assert said in done.stderr and done.stderr.count("\n") == 1
    assert not (ROOT / "new-folder").exists() and not (ROOT / "tools" / "new-folder").exists()


@pytest.mark.parametrize(
    ("python", "said"), [("bare", "expected torch and setuptools beside it"), ("missing", "expected Python 3.12")]
)
def test_a_python_that_cannot_collect_is_told_at_once(tmp_path: Path, python: str, said: str) -> None:
    """Its source distribution could not be asked for, after minutes of downloads."""
    interpreter = tmp_path / "missing"
    if python == "bare":
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
        interpreter = tmp_path / "bare" / "bin" / "python"
    done = bash(KIT, tmp_path / "out", PYTHON=str(interpreter))
    assert done.returncode == 2
    assert said in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", [KIT, UNPACK])
def test_help(script: Path) -> None:
    done = bash(script, "--help")
    assert done.returncode == 0 and done.stdout.count("usage:") == 1
    assert bash(script).returncode == 2
