# shellcheck shell=bash
# Sourced by demo.sh and test.sh, in the root of the repository: makes .venv and installs the package into it.

say() { printf '\n== %s\n' "$*"; }

fail() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 1
}

# The interpreter to make .venv with: $PYTHON, else python3. DeepSpeed compiles a small collective when it first
# starts on CPUs, which needs a C++ compiler and Python's headers.
check_machine() {
    local python=${PYTHON:-python3}
    command -v "$python" >/dev/null ||
        fail "$python not found; install Python 3.11 to 3.14, or set PYTHON to one"
    "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' ||
        fail "$("$python" --version) is not one that the packages of launch/constraints.txt are made for; install Python \
3.11 to 3.14, or set PYTHON to one"
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python cannot make virtual environments; install python3-venv (Debian, Ubuntu)"
    command -v "${CXX:-c++}" >/dev/null || command -v g++ >/dev/null ||
        fail "no C++ compiler; install g++ (Debian, Ubuntu) or gcc-c++ (Fedora), or set CXX to one"
    "$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
        fail "$python has no C headers; install python3-dev (Debian, Ubuntu) or python3-devel (Fedora)"
}

# set_up EXTRA: install the package with that extra, unless nothing changed since the last time.
set_up() {
    local extra=$1 digest
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        say "making .venv with $("${PYTHON:-python3}" --version)"
        "${PYTHON:-python3}" -m venv --clear .venv
    fi
    export PATH="$PWD/.venv/bin:$PATH" # DeepSpeed looks for ninja there
    digest=$({ pwd; cat pyproject.toml launch/constraints.txt; } | cksum)
    # "dev" contains "demo".
    if grep -qsxF "$digest" ".venv/.installed-$extra" .venv/.installed-dev; then
        return
    fi
    say "installing mpruner-dist[$extra] into .venv (some minutes the first time)"
    rm -f .venv/.installed-*
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-input \
        --constraint launch/constraints.txt --editable ".[$extra]" ||
        fail "pip could not install mpruner-dist[$extra]; its message is above"
    say "compiling DeepSpeed's collective for CPUs (a minute, once a machine)"
    DS_ACCELERATOR=cpu .venv/bin/python -c \
        'from mpruner_dist.cluster.engine import compile_collective; compile_collective()' >/dev/null ||
        fail "DeepSpeed could not compile its collective; the compiler's message is above"
    printf '%s\n' "$digest" >".venv/.installed-$extra"
}
