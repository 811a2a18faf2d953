#!/usr/bin/env bash
# Everything worth doing on a GPU, in one call of under ten minutes: bench/gpu.sh FOLDER [STEP…]
# FOLDER gets the machine's report, the tests' output, every bench's JSON and a profile. With names
# of steps only those are done (train: all that begin so); a step has at most its own limit and what is
# left of the call, and what no time was left for is named at the end: the STEPs of a second call.
# Wheels for packages that the machine lacks may lie in .wheels/ (no index is asked).
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:?usage: bench/gpu.sh FOLDER [STEP…]}")
shift
wanted=" $* "
python=${PYTHON:-python3}
total=${SECONDS_IN_ALL:-580}
mkdir -p "$out"
failed=0
left_out=

step() { # step NAME SECONDS COMMAND…: run it, keep what it prints, go on where it fails
    local name=$1 limit=$2 left=$((total - SECONDS))
    shift 2
    [ "$wanted" = "  " ] || [[ $wanted == *" $name "* || $wanted == *" ${name%%_*} "* ]] || return
    echo "== $name"
    [ "$limit" -le "$left" ] || limit=$left
    [ "$limit" -ge 10 ] || { left_out+=" $name"; failed=1; return; }
    timeout "$limit" "$@" > "$out/$name.txt" 2>&1
    local status=$?
    tail -n 25 "$out/$name.txt"
    [ $status -eq 0 ] || { echo "$name: exit status $status"; failed=1; }
}

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
if [ -d .wheels ]; then
    "$python" -m pip install --quiet --no-index --no-deps .wheels/*.whl
fi
"$python" -m pip install --quiet --no-index --no-deps --no-build-isolation . \
    || { echo "not installed: running from the source folders"
         export PYTHONPATH="$PWD:$PWD/kernels:$PWD/train"; }

bench=("$python" -m dar_fast.cli bench)
large=(--tokenizer v1 --random-weights --quick --json)
train=("$python" -m dar_fast.cli bench train --quick --json)
step doctor 60 "$python" -m dar_fast.cli doctor --self-test --json
step tests 150 "$python" -m pytest -q -m "not slow" tests/dar_fast/test_golden_cuda.py \
    tests/dar_fast/engine tests/dar_fast/test_golden_tokenizer.py \
    tests/dar_fast/test_golden_prior.py tests/dar_fast/test_golden_training.py tests/dar_kernels
step latency 90 "${bench[@]}" latency --prior L "${large[@]}" --quantised int8 fp8 \
    --out "$out/latency.json"
step train_L 90 "${train[@]}" --prior L --batch 128 --out "$out/train_L.json"
step train_v1 120 "${train[@]}" --tokenizer v1 --batch 64 --out "$out/train_v1.json"
step train_XL 90 "${train[@]}" --prior XL --batch 64 --out "$out/train_XL.json"
step latency_xl 90 "${bench[@]}" latency --prior XL "${large[@]}" --quantised int8 fp8 \
    --out "$out/latency_xl.json"
step throughput 90 "${bench[@]}" throughput --prior L "${large[@]}" --requests 128 \
    --batch-sizes 16 64 --arrivals 40 --out "$out/throughput.json"
step memory 40 "${bench[@]}" memory --prior L "${large[@]}" --budget-gb 80 \
    --out "$out/memory.json"
step kernels 120 "$python" bench/gpu_kernels.py --seconds 90 --out "$out/kernels.json"
step sampling 60 "$python" bench/sampling.py --quick --out "$out/sampling.json"
step operators 40 "$python" bench/operators.py --out "$out/operators.json"
for backend in sdpa-flash sdpa-cudnn sdpa-efficient flash-attn flash-attn-4 xformers; do
    step "train_L_$backend" 60 "${train[@]}" --prior L --batch 128 --alone --attention "$backend" \
        --out "$out/train_L_$backend.json"
    step "train_v1_$backend" 90 "${train[@]}" --tokenizer v1 --batch 64 --alone \
        --attention "$backend" --out "$out/train_v1_$backend.json"
done
[ -z "$left_out" ] || echo "no time was left for:$left_out"
exit $failed
