#!/usr/bin/env bash
# Everything that needs an accelerator, in one command of at most 8 minutes on one H100: see device.py beside this file.
#   benchmarks/device.sh --wheels          where packages can be fetched: bring along what a bare machine lacks
#   OUT=FOLDER benchmarks/device.sh        on the machine with the accelerator
#   benchmarks/device.sh --dry-run         the same on a CPU, every step in its smallest form
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
venv=$root/.venv/bin/python
[ -x "$venv" ] || venv=python3
exec "${PYTHON:-$venv}" "$root/benchmarks/device.py" "$@"
