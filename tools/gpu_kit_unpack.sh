#!/usr/bin/env bash
# Unpacks the kit that lies beside this script into a new environment of Python, and checks it; needs no network.
set -euo pipefail

usage() {
    cat << 'EOF'
usage: bash unpack.sh VENV [--without-te]

Makes VENV, an environment in front of the Python that has torch (PYTHON=..., default python3.12), installs the kit into it
and checks that everything is there. Transformer Engine's torch part is compiled with as many jobs as there are cores
(MAX_JOBS=...), which takes minutes; it needs the headers of CUDA 13 (CUDA_HOME=..., default /usr/local/cuda, else those
of torch's own packages).
EOF
}

[[ ${1:-} == --help || ${1:-} == -h ]] && { usage && exit 0; }
[[ $# -ge 1 ]] || { usage >&2 && exit 2; }
mistake() { echo "error: $*" >&2 && exit 2; }
venv=$(realpath -m "$1")
[[ ! -e $venv ]] || mistake "VENV $1: expected a folder that is not there yet; give another name"
[[ -z ${2:-} || $2 == --without-te ]] || mistake "$2: expected --without-te; see --help"
cd "$(dirname "${BASH_SOURCE[0]}")"
python=$(command -v "${PYTHON:-python3.12}") || mistake "PYTHON ${PYTHON:-python3.12}: expected Python 3.12; set PYTHON"
[[ $("$python" -c 'import sys; print(*sys.version_info[:2], sep=".")') == 3.12 ]] ||
    mistake "PYTHON $python: expected Python 3.12, for which the kit was made; set PYTHON"

sha256sum --quiet --check SHA256SUMS || mistake "the kit in $PWD: expected the files of SHA256SUMS; copy them again"
kit=$(mktemp -d -p "$(dirname "$venv")")
trap 'rm -rf "$kit"' EXIT
cat kit.tar.* | tar -x -C "$kit" # in order, as the numbers have one length
(cd "$kit" && sha256sum --quiet --check CONTENT)
torch=$("$python" -c 'import importlib.metadata as m; print(m.version("torch"))' 2> /dev/null) ||
    mistake "PYTHON $python: expected a Python with torch; set PYTHON"
wanted=$(cat "$kit/torch_version")
[[ ${torch%%+*} == "$wanted" ]] || echo "note: torch $torch is here, and the kit was resolved beside $wanted"

"$python" -m venv "$venv"
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
# Behind the environment's own packages come those of the Python that has torch, with what its .pth files name.
"$python" -c 'import sysconfig; print(f"import site; site.addsitedir({sysconfig.get_paths()["purelib"]!r})")' \
    > "$site/zz_rest.pth"
pip=("$venv/bin/python" -m pip --disable-pip-version-check --quiet install --no-index --find-links "$kit/wheels" --no-deps
    --ignore-installed)
"${pip[@]}" -r "$kit/requirements.txt"

if [[ -f $kit/te_version && ${2:-} != --without-te ]]; then
    te=$(cat "$kit/te_version")
    "${pip[@]}" "transformer-engine-cu13==$te"
    nvidia=$("$venv/bin/python" -c 'import nvidia; print(list(nvidia.__path__)[0])')
    cuda=${CUDA_HOME:-/usr/local/cuda}
    [[ -f $cuda/include/cuda_runtime_api.h ]] || cuda=$nvidia/cu13
    export CUDA_HOME=$cuda NVTE_FRAMEWORK=pytorch MAX_JOBS=${MAX_JOBS:-$(nproc)}
    export CPATH=$cuda/include:$cuda/include/cccl:$nvidia/cu13/include:$nvidia/nccl/include:$nvidia/cudnn/include
    PATH=$venv/bin:$PATH "${pip[@]}" --no-build-isolation "$kit"/source/transformer_engine_torch-*
    # Last, since Megatron takes its presence for Transformer Engine.
    "${pip[@]}" "transformer-engine==$te"
    # It looks for torch's own libraries by name.
    echo "export LD_LIBRARY_PATH=$nvidia/nccl/lib:$nvidia/cudnn/lib:$nvidia/cu13/lib:\${LD_LIBRARY_PATH:-}" \
        >> "$venv/bin/activate"
fi

# shellcheck disable=SC1091
set +u && source "$venv/bin/activate" && set -u
python - "$kit/requirements.txt" "$torch" << 'EOF'
import importlib.metadata as metadata, sys

wrong = []
with open(sys.argv[1]) as file:
    wanted = dict(line.strip().split("==") for line in file)
for name, version in {**wanted, "torch": sys.argv[2]}.items():
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        found = "nothing"
    if found != version:
        wrong.append(f"{name}: {found} is installed, {version} is wanted")
sys.exit("\n".join(wrong) or 0)
EOF
if grep -q '^megatron-patch==' "$kit/requirements.txt"; then
    cd "$(dirname "$venv")" # not where a checkout may lie
    megatron-patch --version
    python -W ignore -c 'import megatron.core, deepspeed, torch; print("megatron-core", megatron.core.__version__, "torch", torch.__version__)'
fi
[[ ! -f $site/transformer_engine/__init__.py ]] || python -W ignore -c 'import transformer_engine.pytorch'
echo "everything is there; now: source $venv/bin/activate && megatron-patch selfcheck --output selfcheck"
