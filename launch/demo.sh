#!/usr/bin/env bash
# Set up on a fresh machine, then prune and retrain a real model of 135 M parameters on CPUs, or on two GPUs.
# Arguments go to `mpruner run`, for example: launch/demo.sh --run-dir runs/longer --set retrain.steps=20
# The same command resumes an interrupted run. PYTHON chooses the interpreter.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/setup.sh
source launch/setup.sh

say "checking this machine"
check_machine
set_up demo
say "model and text (build/demo)"
.venv/bin/python launch/prepare_demo.py build/demo
say "mpruner run configs/demo.yaml --run-dir runs/demo $*"
exec .venv/bin/python -m mpruner_dist run configs/demo.yaml --run-dir runs/demo "$@"
