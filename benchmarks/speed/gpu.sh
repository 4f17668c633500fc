#!/usr/bin/env bash
# Run the tests marked `gpu` and the speed benchmarks on a machine with a GPU. The run takes less than nine minutes.
#
#     benchmarks/speed/gpu.sh [folder]
#
# JSON files, pictures and one log are written to the folder (default: build/gpu). The head benchmark includes the
# libraries it compares with if they are installed.
#
# PYTHON=  The Python to use (default: python3). The package is installed into it, because the PyTorch of that Python is
#          the one to measure. Dependencies are not installed, so the script needs no package index.
# WHEELS=  A folder of wheels to install first.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${1:-build/gpu}
python=${PYTHON:-python3}
mkdir -p "$out"
export COLUMNS=120 # the benchmarks would otherwise truncate their tables to 80 columns, because stdout is a pipe
exec > >(tee "$out/log.txt") 2>&1
failed=""

step() { # arguments: name, time limit in seconds, command
  echo "== $1: ${*:3}"
  local start=$SECONDS
  timeout "$2" "${@:3}" || failed+=" $1"
  echo "== $1: $((SECONDS - start)) s"
}

if [ -n "${WHEELS:-}" ]; then
  step wheels 60 "$python" -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl
fi
step install 60 "$python" -m pip install --quiet --no-deps --no-build-isolation --editable .
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
step report 30 "$python" -m amapo_loss
step tests 180 "$python" -m pytest -q -m gpu -p no:cacheprovider
step latency 90 "$python" -m benchmarks.speed.latency --out "$out/latency_gpu.json"
step head 120 "$python" -m benchmarks.speed.head --out "$out/head_gpu.json"
step trainer 60 "$python" -m benchmarks.speed.trainer --out "$out/trainer_gpu.json"
echo "== done in $SECONDS s${failed:+, failed:$failed}"
[ -z "$failed" ]
