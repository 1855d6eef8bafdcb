#!/usr/bin/env bash
# Collects, on a machine with the package registry, what a bare GPU machine lacks to run this project; see docs/gpu.md.
set -euo pipefail

usage() {
    cat << 'EOF'
Collects what a bare GPU machine lacks to run megatron-patch, in pieces of at most 60 MiB.

usage: tools/gpu_kit.sh FOLDER [--without-te]
       tools/gpu_kit.sh FOLDER --pack KIT

FOLDER gets kit.tar.000, kit.tar.001, ... , SHA256SUMS and unpack.sh; it must not be there yet. The machine is x86-64 with
CUDA 13, Python 3.12 and torch 2.11 (TORCH=..., TE=... for other versions), and reaches nothing. Copy all files there, and
run unpack.sh. In the kit are the wheels of this package, megatron-core, deepspeed and what they need beyond torch; and of
Transformer Engine the core wheel, and the source of its torch part, which unpack.sh compiles. Needs the registry and
Python 3.12 (PYTHON=..., default .venv/bin/python, which `make setup` makes), with torch and setuptools unless
--without-te; takes minutes. --pack only packs a kit that was collected before.
EOF
}

[[ ${1:-} == --help || ${1:-} == -h ]] && { usage && exit 0; }
[[ $# -ge 1 ]] || { usage >&2 && exit 2; }
out=$(realpath -m "$1")
mistake() { echo "error: $*" >&2 && exit 2; }
[[ $out != -* ]] || mistake "FOLDER $1: expected a new folder; name it first"
[[ ! -e $out ]] || mistake "FOLDER $1: expected a folder that is not there yet; give another name"
with_te=yes kit=
case "${2:-}" in
    "") ;;
    --without-te) with_te= ;;
    --pack) kit=$(realpath -m "${3:?--pack KIT: expected the folder of a kit}") ;;
    *) mistake "$2: expected --without-te or --pack KIT; see --help" ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
torch=${TORCH:-2.11.0} te=${TE:-2.20.2}
# What the torch part of Transformer Engine is compiled with, and imports.
te_needs=(setuptools wheel ninja cmake pybind11 packaging onnxscript onnx nvdlfw-inspect 'nvidia-cudnn-frontend>=1.29'
    pydantic einops)

collect() { # into the folder $1
    local kit=$1 work=$1.work python
    python=${PYTHON:-.venv/bin/python}
    [[ $("$python" -c 'import sys; print(*sys.version_info[:2], sep=".")' 2> /dev/null) == 3.12 ]] ||
        mistake "PYTHON $python: expected Python 3.12, as on the GPU machine; run make setup, or set PYTHON=/path/to/python3.12"
    # pip asks the source of Transformer Engine's torch part for its name, and that imports both.
    [[ -z $with_te ]] || "$python" -c 'import setuptools, torch' 2> /dev/null ||
        mistake "PYTHON $python: expected torch and setuptools beside it; run make setup, or give --without-te"
    local pip=("$python" -m pip --disable-pip-version-check --quiet)
    mkdir -p "$kit/wheels" "$kit/source" "$work"
    "${pip[@]}" wheel --no-deps --wheel-dir "$kit/wheels" .
    echo "torch==$torch" > "$work/constraints"
    local ours=("$kit"/wheels/*.whl)
    local wanted=("${ours[@]}")
    [[ -z $with_te ]] || wanted+=("${te_needs[@]}")
    # Two resolutions, of which only the names and versions are used: theirs is what the machine has.
    "${pip[@]}" install --dry-run --ignore-installed --report "$work/all.json" -c "$work/constraints" "${wanted[@]}"
    "${pip[@]}" install --dry-run --ignore-installed --report "$work/theirs.json" "torch==$torch"
    "$python" - "$work" << 'EOF' > "$kit/requirements.txt"
import json, re, sys

def versions(name):
    with open(f"{sys.argv[1]}/{name}.json") as file:
        found = (entry["metadata"] for entry in json.load(file)["install"])
        return {re.sub(r"[-_.]+", "-", m["name"]).lower(): m["version"] for m in found}

theirs = versions("theirs")
for name, version in sorted(versions("all").items()):
    if name not in theirs:
        print(f"{name}=={version}")
EOF
    grep -v '^megatron-patch==' "$kit/requirements.txt" > "$work/others"
    # Ready wheels as they are; deepspeed is built, without its kernels.
    "${pip[@]}" wheel --no-deps --wheel-dir "$kit/wheels" -r "$work/others"
    if [[ -n $with_te ]]; then
        "${pip[@]}" download --no-deps --dest "$kit/wheels" "transformer-engine-cu13==$te" "transformer-engine==$te"
        "${pip[@]}" download --no-deps --no-build-isolation --no-binary :all: --dest "$kit/source" "transformer-engine-torch==$te"
        echo "$te" > "$kit/te_version"
    fi
    echo "$torch" > "$kit/torch_version"
    rm -rf "$work"
}

partial=$out.partial
rm -rf "$partial"
mkdir -p "$partial"
trap 'rm -rf "$partial"' EXIT
if [[ -z $kit ]]; then
    kit=$partial/kit
    collect "$kit"
fi
cp tools/gpu_kit_unpack.sh "$partial/unpack.sh"
(cd "$kit" && find . -type f ! -name CONTENT | sort | xargs sha256sum > "$partial/content")
mv "$partial/content" "$kit/CONTENT"
tar -C "$kit" -cf - . | split --bytes=60M --numeric-suffixes --suffix-length=3 - "$partial/kit.tar."
[[ $kit != "$partial/kit" ]] || rm -rf "$kit"
(cd "$partial" && sha256sum kit.tar.* unpack.sh > SHA256SUMS)
mv "$partial" "$out"
trap - EXIT
echo "$(find "$out" -name 'kit.tar.*' | wc -l) pieces, $(du -shL "$out" | cut -f1), in $out; on the GPU machine: bash unpack.sh VENV"
