#!/usr/bin/env bash
# Run the tests marked `gpu` and the speed benchmarks on a machine with a GPU. The time limits add up to 14 minutes.
#
#     benchmarks/speed/gpu.sh [folder]
#
# JSON files, pictures and one log are written to the folder (default: build/gpu). The most telling steps come first.
# The benchmarks of the loss and the head write their file after every size and every head, so that a run that is cut off
# leaves what it has found. The head benchmark includes the libraries it compares with if they are installed.
#
# PYTHON=  The Python to use (default: python3). The package is installed into it, because the PyTorch of that Python is
#          the one to measure. Dependencies are not installed, so the script needs no package index.
# WHEELS=  A folder of wheels to install first.
# STEPS=   The steps to run, in this order (default: all of them).
# LATENCY_ARGS=, HEAD_ARGS=, TRAINER_ARGS=, TESTS_ARGS=
#          Arguments for these steps, such as other sizes. TESTS_ARGS are for both steps that run pytest.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit
out=${1:-build/gpu}
python=${PYTHON:-python3}
mkdir -p "$out"
export COLUMNS=120 # the benchmarks would otherwise truncate their tables to 80 columns, because stdout is a pipe
export PYTHONUNBUFFERED=1
exec > >(tee "$out/log.txt") 2>&1
failed=""

step() { # arguments: name, time limit in seconds, command. The step is interrupted, so that it can still report.
  echo "== $1: ${*:3}"
  local start=$SECONDS
  timeout --signal INT --kill-after 10 "$2" "${@:3}" || failed+=" $1"
  echo "== $1: $((SECONDS - start)) s"
}

pytest() { # arguments: name, time limit in seconds, arguments of pytest
  local workers=""
  if "$python" -c "import xdist" 2> /dev/null; then workers="--numprocesses $(($(nproc) - 2)) --dist worksteal"; fi
  # -v prints a line for each test, so that a run that is cut off has named its failures.
  # A warning of a library that is newer here than in development must not fail a test.
  # shellcheck disable=SC2086  # the variables hold several arguments, or none
  step "$1" "$2" "$python" -m pytest -v -m gpu -p no:cacheprovider -W default --tb short -rf $workers "${@:3}" ${TESTS_ARGS:-}
}

# shellcheck disable=SC2086  # as above
run() {
  case $1 in
    install) step install 60 "$python" -m pip install --quiet --no-deps --no-build-isolation --editable . ;;
    report) step report 30 "$python" -m amapo_loss ;;
    essentials) pytest essentials 120 tests/loss/test_pair_loss.py tests/logps -k "OnAGpu or OnGPU or boundary" ;;
    latency) step latency 120 "$python" -m benchmarks.speed.latency --out "$out/latency_gpu.json" ${LATENCY_ARGS:-} ;;
    head) step head 180 "$python" -m benchmarks.speed.head --rounds 3 --out "$out/head_gpu.json" ${HEAD_ARGS:-} ;;
    tests) pytest tests 240 tests/loss tests/logps ;;
    trainer) step trainer 60 "$python" -m benchmarks.speed.trainer --out "$out/trainer_gpu.json" ${TRAINER_ARGS:-} ;;
    *) echo "unknown step $1" && failed+=" $1" ;;
  esac
}

if [ -n "${WHEELS:-}" ]; then
  step wheels 60 "$python" -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl
fi
for name in ${STEPS:-install report essentials latency head tests trainer}; do
  run "$name"
done
echo "== done in $SECONDS s${failed:+, failed:$failed}"
[ -z "$failed" ]
