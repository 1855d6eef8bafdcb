#!/usr/bin/env bash
# The main job from nothing, on CPU: tokenizer -> dataset -> pretraining on two ranks -> report. `make quickstart`.
# The text is the Python standard library's own source, which is on every machine; nothing is downloaded.
set -euo pipefail

for word in "$@"; do
    if [[ "$word" == --help || "$word" == -h ]]; then
        cat << 'EOF'
The main job from nothing, on CPU, in minutes: tokenizer -> dataset -> pretraining on two ranks -> report.

usage: launch/quickstart.sh [flag ...]

Flags of Megatron and of megatron_patch go to the run and win over configs/quickstart_proxy.yaml.
Everything is written to runs/quickstart; what is there from an earlier time is kept under another name.

example: launch/quickstart.sh --train-iters 50
EOF
        exit 0
    fi
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH"
export CUDA_VISIBLE_DEVICES= # on CPU also where there are GPUs

out=runs/quickstart
if [[ -e "$out" ]]; then
    mv "$out" "$out.$(date +%Y%m%d-%H%M%S)" # nothing of an earlier run is lost, and none of it is resumed
fi
mkdir -p "$out"

python tools/train_tokenizer.py --input stdlib --sample-documents 300 --vocab-size 4096 --output-prefix "$out/tokenizer"
python tools/preprocess_data.py --input stdlib --tokenizer-model "$out/tokenizer.model" --append-eod --workers 2 \
    --output-prefix "$out/stdlib"
launch/pretrain.sh --num-gpus 2 --config configs/quickstart_proxy.yaml \
    --data-path "$out/stdlib" --data-cache-path "$out/cache" --tokenizer-model "$out/tokenizer.model" --split 96,2,2 "$@"
python tools/report.py "$out" --output "$out/report.html"
