#!/usr/bin/env bash
# Everything that needs a GPU, in one call on a machine that has one: builds, tests, times. The table comes last.
# OUT (default /tmp/cuda_check) keeps the logs and the stored run.
set -uo pipefail
cd "$(dirname "$0")/.."
out="${OUT:-/tmp/cuda_check}"
mkdir -p "$out"
export PYTHONUNBUFFERED=1 PYTHONPATH=.
nvidia-smi --query-gpu=name,driver_version,clocks.sm,power.draw --format=csv,noheader
python3 -m pytest -q -p no:cacheprovider tests -m cuda >"$out/tests.log" 2>&1
code=$?
tail -15 "$out/tests.log"
python3 perf/cuda_speed.py "$@" 2>&1 | tee "$out/speed.txt"
exit "$code"
