#!/usr/bin/env bash
# Measures and tests everything that needs an NVIDIA GPU, in at most 12 minutes: docs/gpu.md. All options are those of
# gpu_day.py, for example
#   benchmarks/gpu_day.sh --output gpu_day --wheels FOLDER
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_day.py" "$@"
