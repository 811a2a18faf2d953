#!/usr/bin/env bash
# Everything worth doing on a GPU, in one call of under ten minutes: bench/gpu.sh FOLDER
# FOLDER gets the machine's report, the tests' output, every bench's JSON and a profile.
# Wheels for packages that the machine lacks may lie in .wheels/ (no index is asked).
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:?usage: bench/gpu.sh FOLDER}")
python=${PYTHON:-python3}
mkdir -p "$out"
failed=0

step() { # step NAME SECONDS COMMAND…: run it, keep what it prints, go on where it fails
    local name=$1 limit=$2
    shift 2
    echo "== $name"
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

step doctor 30 "$python" -m dar_fast.cli doctor --json
step tests 200 "$python" -m pytest -q -m "not slow" tests/dar_fast/test_golden_cuda.py \
    tests/dar_fast/test_golden_tokenizer.py tests/dar_fast/test_golden_prior.py tests/dar_kernels
step kernels 200 "$python" bench/gpu_kernels.py --seconds 150 --out "$out/kernels.json"
step sampling 120 "$python" bench/sampling.py --out "$out/sampling.json"
step operators 40 "$python" bench/operators.py --out "$out/operators.json"
exit $failed
