#!/usr/bin/env bash
# Ours against PyTorch and CTranslate2 on this machine; makes the peers' environment first, in .venv-peers.
#
#   benchmarks/peers.sh [--size=base] [--threads=N] [--output_dir=DIR] [...]
#
# The arguments are those of `python -m benchmarks.peers`.  PYTHON is ours (default .venv/bin/python, else python3);
# VENV another place for theirs; TORCH another requirement, such as torch==2.13.0+cu130.
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
cd "$(dirname "$0")/.."
venv=${VENV:-.venv-peers}
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=python3
if [ ! -e "$venv/.ready" ]; then
  python3 -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet "${TORCH:-torch==2.13.0}" transformers ctranslate2 safetensors
  touch "$venv/.ready"
fi
exec "$python" -m benchmarks.peers --python="$venv/bin/python" "$@"
