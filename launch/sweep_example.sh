#!/usr/bin/env bash
# The worked example from nothing, on CPU: data -> sweep of proxy and target -> tuned target config -> report.
set -euo pipefail

usage() {
    cat << 'EOF'
The worked example from nothing, on CPU: data -> sweep of proxy and target -> tuned target config -> report.

usage: launch/sweep_example.sh [--quick]

  --quick   two minutes: the same machinery, too short to say anything about learning rates; without it, hours
            (docs/transfer-example.md has what came out)
  --help

Everything is written to runs/sweep-example or runs/sweep-example-quick. Started again, it goes on where it was.
EOF
}

(($# < 2)) || { echo "error: $*: expected nothing or --quick; see --help" >&2; exit 2; }
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH"
export CUDA_VISIBLE_DEVICES= # on CPU also where there are GPUs

case "${1:-}" in
    "") name=sweep-example sweep=configs/sweep_example.yaml force=() ;;
    # its six short trainings do not place an optimum, which transfer_config.py says and would stop at
    --quick) name=sweep-example-quick sweep=configs/sweep_example_quick.yaml force=(--force) ;;
    --help | -h) usage; exit 0 ;;
    *) echo "error: $1: expected nothing or --quick; see --help" >&2; exit 2 ;;
esac
out=runs/$name
data=runs/sweep-example/data
if [[ ! -e $data/stdlib.idx ]]; then
    mkdir -p "$data"
    python tools/train_tokenizer.py --input stdlib --sample-documents 300 --vocab-size 1024 \
        --output-prefix "$data/tokenizer"
    python tools/preprocess_data.py --input stdlib --tokenizer-model "$data/tokenizer.model" --append-eod --workers 2 \
        --output-prefix "$data/stdlib"
fi
python tools/sweep.py "$sweep" --workers 2 --resume
python tools/transfer_config.py --sweep "$out" --target configs/example_target_w256.yaml --output "$out/target.yaml" \
    "${force[@]}"
python tools/report.py "$out" --output "$out/report.html"
