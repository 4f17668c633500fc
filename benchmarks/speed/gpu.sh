#!/usr/bin/env bash
# Everything that only a GPU can show, unattended and in under nine minutes: the `gpu` tests, then the benchmarks, peers
# where they are installed. JSON, pictures and one log go into a folder. Installs into the Python that is there, or
# PYTHON=, as its PyTorch is the one to measure; without dependencies, so that no package index is needed. WHEELS= names a
# folder of wheels to install first.
#
#     benchmarks/speed/gpu.sh [folder]
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${1:-build/gpu}
python=${PYTHON:-python3}
mkdir -p "$out"
exec > >(tee "$out/log.txt") 2>&1
failed=""

step() { # name, seconds at most, command
  echo "== $1: ${*:3}"
  local begun=$SECONDS
  timeout "$2" "${@:3}" || failed+=" $1"
  echo "== $1: $((SECONDS - begun)) s"
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
