#!/usr/bin/env bash
# Everything that only a GPU can show, unattended and in under nine minutes: the `gpu` tests, then the benchmarks, peers
# where they are installed. JSON, pictures and one log go into a folder. Uses the PyTorch that is there, under a virtual
# environment of its own; where there is no package index, WHEELS= names a folder of wheels, which are installed first.
#
#     benchmarks/gpu.sh [folder]
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-build/gpu}
python=build/gpu-venv/bin/python
mkdir -p "$out"
exec > >(tee "$out/log.txt") 2>&1
failed=""

step() { # name, seconds at most, command
  echo "== $1: ${*:3}"
  local begun=$SECONDS
  timeout "$2" "${@:3}" || failed+=" $1"
  echo "== $1: $((SECONDS - begun)) s"
}

"${PYTHON:-python3}" -m venv --system-site-packages build/gpu-venv || exit 1
if [ -n "${WHEELS:-}" ]; then
  step wheels 60 "$python" -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl
fi
step install 60 "$python" -m pip install --quiet --no-deps --no-build-isolation .
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
step report 30 "$python" -m amapo_loss
step tests 180 "$python" -m pytest -q -m gpu -p no:cacheprovider
step latency 90 "$python" -m benchmarks.latency --out "$out/latency_gpu.json"
step head 120 "$python" -m benchmarks.head --out "$out/head_gpu.json"
step trainer 60 "$python" -m benchmarks.trainer --out "$out/trainer_gpu.json"
echo "== done in $SECONDS s${failed:+, failed:$failed}"
[ -z "$failed" ]
