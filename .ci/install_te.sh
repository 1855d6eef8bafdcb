#!/usr/bin/env bash
# Makes the environment of `make test-te`: Transformer Engine with its PyTorch extension, compiled here, without a GPU.
#   PYTHON=python3.12 .ci/install_te.sh [FOLDER]       default folder: .venv-te
# Needs the CUDA toolkit's headers (CUDA_HOME, default /usr/local/cuda). The compilation takes about 20 minutes on two
# cores; pip keeps the wheel, so that another environment on the same machine has it in seconds.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=${1:-.venv-te}
version=${TE_VERSION:-2.20.2}
python=${PYTHON:-$(.ci/find_python)}
cuda=${CUDA_HOME:-/usr/local/cuda}
stamp=$folder/.installed-$version

[[ -f $stamp ]] && exit 0
if [[ ! -f $cuda/include/cuda.h ]]; then
    echo "error: no cuda.h in $cuda/include; install the CUDA toolkit or set CUDA_HOME" >&2
    exit 2
fi

[[ -x $folder/bin/python ]] || "$python" -m venv "$folder"
pip=("$folder/bin/pip" install --quiet --disable-pip-version-check)
"${pip[@]}" --editable '.[dev]'
"${pip[@]}" setuptools wheel ninja cmake pybind11 packaging onnxscript onnx nvdlfw-inspect 'nvidia-cudnn-frontend>=1.29' \
    pydantic einops "transformer-engine-cu13==$version"

# The build finds neither NCCL nor cuDNN by itself: torch's own copies are used.
site=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
export CUDA_HOME=$cuda NVTE_FRAMEWORK=pytorch MAX_JOBS=${MAX_JOBS:-2}
export CPATH=$cuda/include:$cuda/include/cccl:$site/nvidia/cu13/include:$site/nvidia/nccl/include:$site/nvidia/cudnn/include
PATH=$PWD/$folder/bin:$PATH "${pip[@]}" --no-build-isolation --no-deps "transformer-engine-torch==$version"
# The package without content that TE's import check asks for; installed last, since Megatron takes its presence for TE.
"${pip[@]}" --no-deps "transformer-engine==$version"
touch "$stamp"
