#!/usr/bin/env bash
# Set up on a fresh machine, then run every check; the first that fails ends it.
# Arguments go to pytest, for example: launch/test.sh -m 'not ray' -k rewrite
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/setup.sh
source launch/setup.sh

step() {
    say "$*"
    "$@"
}

check_machine
set_up dev
python=.venv/bin/python
if command -v shellcheck >/dev/null; then
    step shellcheck --external-sources launch/*.sh slurm/*.sbatch slurm/*.example .ci/run
else
    say "shellcheck: skipped, it is not on PATH"
fi
step "$python" -m ruff check .
step "$python" -m ruff format --check .
step "$python" -m mypy
step "$python" launch/prepare_demo.py build/demo
if (($#)); then
    step "$python" -m pytest "$@"
else
    # two at a time, each on one thread; what starts clusters has the machine for itself
    step env OMP_NUM_THREADS=1 "$python" -m pytest --numprocesses 2 -m 'not ray and not slurm'
    step "$python" -m pytest -m 'ray or slurm'
fi
