"""What a machine is made of, without torch: system, processors, memory, GPUs, interconnect."""

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import psutil

from mpruner_dist.cluster.control_group import memory_limit

Facts = dict[str, Any]


def system() -> Facts:
    """Distribution, kernel, C library."""
    return {
        "distribution": platform.freedesktop_os_release().get("PRETTY_NAME", "unknown"),
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "C library": " ".join(platform.libc_ver()),
    }


def processors() -> Facts:
    """Model, cores, memory, and the limit of the control group."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    limit = memory_limit()
    return {
        "model": models[0] if models else platform.processor() or "unknown",
        "logical cores": os.cpu_count(),
        "this process may use": len(os.sched_getaffinity(0)),
        "memory": f"{psutil.virtual_memory().total / 1e9:.1f} GB",
        "control group's limit of memory": "none" if limit is None else f"{limit / 1e9:.1f} GB",
    }


def gpus() -> Facts:
    """Names, memory and driver, and how they are linked, as far as nvidia-smi is there."""
    if shutil.which("nvidia-smi") is None:
        return {"nvidia-smi": "not found"}
    columns = "name,memory.total,driver_version"
    listed = said(["nvidia-smi", f"--query-gpu={columns}", "--format=csv,noheader"]).splitlines()
    return {"devices": listed, "links": said(["nvidia-smi", "topo", "-m"])}


def interconnect() -> Facts:
    """InfiniBand ports and network interfaces that are up; no addresses."""
    ports = sorted(Path("/sys/class/infiniband").glob("*/ports/*"))
    facts: Facts = {
        f"{port.parent.parent.name} port {port.name}": ", ".join(
            (port / name).read_text().strip() for name in ("link_layer", "rate", "state")
        )
        for port in ports
    }
    for name, state in sorted(psutil.net_if_stats().items()):
        if state.isup:
            facts[name] = f"{state.speed} Mb/s, MTU {state.mtu}" if state.speed else f"speed unknown, MTU {state.mtu}"
    return {"InfiniBand": "no ports"} | facts if not ports else facts


def said(command: list[str], timeout: float = 20) -> str:
    """What a command printed.

    Raises:
        OSError: there is no such command.
        subprocess.SubprocessError: it failed, or took too long.
    """
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=timeout).stdout.strip()
