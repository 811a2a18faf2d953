#!/usr/bin/env bash
# Trains the embedded model at 64 x 64 on a GPU, in calls that resume one another: bench/gpu_demo.sh FOLDER
# Each call works for eight minutes (MINUTES) on runs/demo and data/emoji-64.npz; call it until it says
# "finished". FOLDER then gets the pipeline and its report as demo.tar in parts of under 16 MiB:
#     cat FOLDER/demo.tar.* | tar x
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:?usage: bench/gpu_demo.sh FOLDER}")
python=${PYTHON:-python3}
mkdir -p "$out"
if [ -d .wheels ]; then
    "$python" -m pip install --quiet --no-index --no-deps .wheels/*.whl
fi
export PYTHONPATH="$PWD:$PWD/kernels:$PWD/train"
[ -f data/emoji-64.npz ] || { echo "expected data/emoji-64.npz: dar train emoji --out data --size 64"; exit 2; }
"$python" -m dar_train.cli demo --size gpu --data data/emoji-64.npz --out runs/demo \
    --call-minutes "${MINUTES:-8}"
if [ -e runs/demo/finished ]; then
    tar c -C runs/demo pipeline report | split -b 15M -d - "$out/demo.tar."
    echo "finished"
else
    find runs/demo -name 'step-*.png' -newer data/emoji-64.npz | sort | tail -n 2 | xargs -r -I{} cp {} "$out/"
    echo "not finished: call again"
fi
