"""Everything about a machine that a bug report needs. What cannot be read is said to be so; nothing secret is told."""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mpruner_dist
from mpruner_dist.machine.hardware import Facts, gpus, interconnect, processors, said, system

PACKAGES = ("torch", "deepspeed", "ray", "transformers", "datasets", "safetensors", "accelerate", "peft", "numpy")
VARIABLES = (
    "NCCL_", "GLOO_", "OMP_", "MKL_", "CUDA_", "ROCR_", "HIP_", "RAY_", "HF_", "DS_", "TORCH_", "PYTORCH_",
    "TOKENIZERS_", "SLURM_JOB_ID", "SLURM_JOB_NUM_NODES", "SLURM_JOB_PARTITION", "SLURM_NTASKS", "SLURM_CPUS_PER_TASK",
    "SLURM_GPUS", "SLURM_MEM", "SLURM_JOB_GPUS", "SLURM_PROCID", "SLURM_NODEID", "SLURM_RESTART_COUNT",
)  # fmt: skip
"""Beginnings of the names of environment variables that change what a run does."""
SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL")
NOT_SECRET = ("TOKENIZERS_PARALLELISM", "RAY_AUTH_TOKEN_PATH", "HF_TOKEN_PATH")
UNREADABLE = (OSError, ValueError, LookupError, AttributeError, ImportError, subprocess.SubprocessError)
"""How reading a part may fail without the other parts being lost."""


def describe_machine() -> dict[str, Facts]:
    """All parts, each by its name; of a part that cannot be read, why."""
    parts: dict[str, Callable[[], Facts]] = {
        "versions": versions, "system": system, "processors": processors, "GPUs": gpus, "interconnect": interconnect,
        "torch": torch, "Slurm": slurm, "Ray": ray_cluster, "environment": variables,
    }  # fmt: skip
    with ThreadPoolExecutor(len(parts)) as pool:  # torch and Ray take seconds each
        return dict(zip(parts, pool.map(_read, parts.values()), strict=True))


def _read(part: Callable[[], Facts]) -> Facts:
    try:
        return part()
    except UNREADABLE as error:
        return {"cannot be read": _reason(error)}


def _reason(error: Exception) -> str:
    printed = str(getattr(error, "stderr", None) or error).strip().splitlines()
    return printed[-1] if printed else type(error).__name__


def as_text(facts: dict[str, Facts]) -> str:
    """The parts as lines for a bug report."""
    lines = []
    for part, content in facts.items():
        lines.append(f"{part}:")
        for name, value in content.items():
            if isinstance(value, dict):
                value = [f"{key} {inner:g}" for key, inner in value.items()]
            rows = value if isinstance(value, list) and value else str(value or "none").splitlines()
            lines += [f"  {name}: {rows[0]}"] if len(rows) == 1 else [f"  {name}:", *(f"    {row}" for row in rows)]
    return "\n".join(lines)


def versions() -> Facts:
    """Of this package, with its commit in a checkout, of Python and of the packages that matter."""
    own = mpruner_dist.__version__
    commit = _commit(Path(mpruner_dist.__file__).parent)
    found: Facts = {"mpruner-dist": f"{own}, commit {commit}" if commit else own}
    found["Python"] = f"{platform.python_version()} ({sys.executable})"
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _commit(folder: Path) -> str | None:
    """The commit of the checkout that this package is part of, and not merely lies in."""
    try:
        said(["git", "-C", str(folder), "ls-files", "--error-unmatch", "__init__.py"])
        commit = said(["git", "-C", str(folder), "rev-parse", "--short=10", "HEAD"])
        changed = said(["git", "-C", str(folder), "status", "--porcelain", "."])
    except (OSError, subprocess.SubprocessError):
        return None  # installed, or no git here
    return f"{commit} with changes" if changed else commit


def torch() -> Facts:
    """What torch says, asked in a process of its own."""
    try:
        return _asked("mpruner_dist.machine.torch_facts")
    except UNREADABLE as error:
        return {"not importable": _reason(error)}


def slurm() -> Facts:
    """Slurm's version, and the job that this process is in."""
    try:
        version = said(["sinfo", "--version"], timeout=5) if shutil.which("sinfo") else "sinfo not found"
    except UNREADABLE as error:
        version = f"cannot be read: {_reason(error)}"
    job = os.environ.get("SLURM_JOB_ID")
    inside = {"job": job, "nodes": os.environ.get("SLURM_JOB_NODELIST", "unknown")} if job else {"job": "not in one"}
    return {"version": version, **inside}


def ray_cluster() -> Facts:
    """How a run would find and enter a cluster, and what that has, if one is set."""
    token = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
    facts: Facts = {
        "RAY_ADDRESS": "set" if "RAY_ADDRESS" in os.environ else "not set: Ray is started on this machine",
        "authentication": f"RAY_AUTH_MODE {os.environ.get('RAY_AUTH_MODE', 'not set')}, token "
        f"{'set' if token else 'not set'} by a variable",
    }
    if "RAY_ADDRESS" in os.environ:
        try:
            facts |= _asked("mpruner_dist.cluster.facts")
        except UNREADABLE as error:
            facts["not reachable"] = _reason(error).replace(os.environ["RAY_ADDRESS"], "RAY_ADDRESS")
    return facts


def _asked(module: str) -> Facts:
    """What a module prints as JSON, as its last line, when it is run."""
    facts: Facts = json.loads(said([sys.executable, "-m", module], timeout=30).splitlines()[-1])
    return facts


def variables() -> Facts:
    """Environment variables that change what a run does, with what is secret or an address masked."""
    names = sorted(name for name in os.environ if name.startswith(VARIABLES))
    return {name: _masked(name, os.environ[name]) for name in names}


def _masked(name: str, value: str) -> str:
    if name.endswith("_ADDRESS") or name == "NCCL_COMM_ID":
        return "set"
    # a value may be JSON with variables in it (RAY_JOB_CONFIG_JSON_ENV_VAR), or a URL with a password
    told = f"{name} {value}".upper()
    secret = any(word in told for word in SECRET) or ("://" in value and "@" in value)
    return "masked" if secret and name not in NOT_SECRET else value
