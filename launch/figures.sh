#!/usr/bin/env bash
# The figures of docs/evidence.md from nothing, on CPU: data -> the runs that the committed tables lack -> figures.
set -euo pipefail

usage() {
    cat << 'EOF'
The figures of docs/evidence.md, on CPU: data -> the runs that the committed tables lack -> figures.

usage: launch/figures.sh [--draw] [NAME ...]
       launch/figures.sh --quick

  NAME      of a sweep file in configs/evidence; default: all
  --quick   two minutes: six runs of 40 steps and their figures in runs/evidence/tables, which say nothing
  --draw    train nothing: the figures from the committed tables, in seconds
  --help

Two runs at a time, on two cores. Started again, it goes on where it was.
EOF
}

draw=false
names=()
for word in "$@"; do
    case "$word" in
        --draw) draw=true ;;
        --quick) names=(quick) ;;
        --help | -h) usage; exit 0 ;;
        -*) echo "error: $word: expected --draw, --quick or names of sweep files; see --help" >&2; exit 2 ;;
        *) names+=("$word") ;;
    esac
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH"
export CUDA_VISIBLE_DEVICES= # on CPU also where there are GPUs

if [[ "$draw" == false ]]; then
    data=runs/evidence/data
    if [[ ! -e $data/stdlib.idx ]]; then
        mkdir -p "$data"
        python tools/train_tokenizer.py --input stdlib --sample-documents 400 --vocab-size 512 \
            --output-prefix "$data/tokenizer"
        python tools/preprocess_data.py --input stdlib --tokenizer-model "$data/tokenizer.model" --append-eod \
            --workers 2 --output-prefix "$data/stdlib"
    fi
    python benchmarks/evidence.py train --workers 2 "${names[@]}"
fi
python benchmarks/evidence_figures.py "${names[@]}"
