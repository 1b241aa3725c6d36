#!/usr/bin/env bash
# What one card says of this package: scripts/gpu_check.py, run from the tree on a machine that may be bare and offline.
#   bash scripts/gpu_check.sh smoke|full [--dry-run]
# OUT: where results go, results/gpu-check by default. WHEELS: a folder of wheels of what the machine lacks; they are
# unpacked into a folder of their own, without their dependencies, and go before what is installed. PYTHON: python3 by default.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if [ -n "${WHEELS:-}" ]; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}:$site"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 TOKENIZERS_PARALLELISM=false
"$python" scripts/gpu_check.py "$@"
