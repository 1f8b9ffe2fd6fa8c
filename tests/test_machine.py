"""`mpruner env` and `mpruner doctor`: what they say of a machine, and of one that is broken."""

import json
import os
import re
import stat
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from mpruner_dist.cluster import look

Mpruner = Callable[..., tuple[int, str]]


def make_command(folder: Path, name: str, script: str) -> None:
    """A program that this machine does not have."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_env_as_json_has_every_part_and_no_secret(mpruner: Mpruner) -> None:
    secrets = {
        "HF_TOKEN": "hf_abcdefgh",
        "RAY_AUTH_TOKEN": "ray-abcdefgh",
        "RAY_JOB_CONFIG_JSON_ENV_VAR": '{"runtime_env": {"env_vars": {"WANDB_API_KEY": "wandb-abcdefgh"}}}',
        "HF_ENDPOINT": "https://me:abcdefgh@hub.example",
        "RAY_ADDRESS": "127.0.0.1:1",
    }
    code, output = mpruner("env", "--json", env=os.environ | secrets | {"NCCL_DEBUG": "INFO", "SLURM_JOB_ID": "17"})
    assert code == 0, output
    facts = json.loads(output)
    assert facts["versions"]["torch"] == version("torch")
    assert re.match(r"\d+\.\d+", facts["versions"]["mpruner-dist"])
    assert facts["system"]["kernel"].startswith("Linux ")
    assert facts["processors"]["this process may use"] == len(os.sched_getaffinity(0))
    assert "lo" in facts["interconnect"]
    assert facts["torch"]["threads"] >= 1
    assert facts["Slurm"]["job"] == "17"
    assert facts["Ray"]["RAY_ADDRESS"] == "set"
    assert "refused" in facts["Ray"]["not reachable"]
    assert facts["environment"]["NCCL_DEBUG"] == "INFO"
    assert facts["environment"]["HF_TOKEN"] == "masked"
    assert "abcdefgh" not in output
    assert "127.0.0.1" not in output


def test_env_where_torch_and_the_driver_are_broken(mpruner: Mpruner, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')\n")
    make_command(tmp_path, "nvidia-smi", "echo 'NVML: Driver/library version mismatch' >&2; exit 18")
    make_command(tmp_path, "sinfo", "echo slurm 24.05.1")
    paths = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    paths["PATH"] = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    code, output = mpruner("env", env=os.environ | paths)
    assert code == 0, output
    assert "torch:\n  not importable: ImportError: libcudart.so.12: cannot open shared object file\n" in output
    assert "GPUs:\n  cannot be read: NVML: Driver/library version mismatch\n" in output
    assert "version: slurm 24.05.1" in output
    assert "Traceback" not in output


def test_env_tells_how_gpus_are_linked(mpruner: Mpruner, tmp_path: Path) -> None:
    listed = 'case "$1" in topo) printf "\\tGPU0\\tGPU1\\nGPU0\\t X \\tNV18";; *) echo "H100, 81559 MiB, 550.54";; esac'
    make_command(tmp_path, "nvidia-smi", listed)
    code, output = mpruner("env", "--json", env=os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"})
    assert code == 0
    gpus = json.loads(output)["GPUs"]
    assert gpus["devices"] == ["H100, 81559 MiB, 550.54"]
    assert "NV18" in gpus["links"]


def test_nvcc_is_looked_for_where_torch_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert not look.tools(str(tmp_path))[look.NVCC]
    (tmp_path / "cuda/bin").mkdir(parents=True)
    make_command(tmp_path / "cuda/bin", "nvcc", "true")
    assert look.tools(str(tmp_path))[look.NVCC]


@pytest.mark.ray
def test_doctor_finds_this_machine_well(mpruner: Mpruner, tmp_path: Path) -> None:
    code, output = mpruner("doctor", "--device", "cpu", "--run-dir", tmp_path / "run")
    assert code == 0, output
    for pattern in (
        r"^ok      Ray: started on this machine: 1 node",
        rf"^ok      nodes: all 1 read and wrote {tmp_path / 'run'}",
        r"^ok      compiler: a C\+\+ compiler, ninja, Python's headers on all 1 node",
        rf"^ok      all-reduce: 64 MB over 2 workers \(cpu\) on {os.uname().nodename}: the sum is right, \d+\.\d+ GB/s",
        r"^ok      training: a step under ZeRO stage 3 moved the weights as torch alone would, within \de-\d+, on all",
    ):
        assert re.search(pattern, output, re.MULTILINE), output
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.ray
def test_doctor_without_a_compiler(mpruner: Mpruner) -> None:
    code, output = mpruner("doctor", "--device", "cpu", "--workers", "1", env=os.environ | {"CXX": "no-such-compiler"})
    assert code == 1
    assert re.search(r"^failed  compiler: .* lacks a C\+\+ compiler .*install them there", output, re.MULTILINE), output
    assert re.search(r"^ok      all-reduce: ", output, re.MULTILINE), output
    assert re.search(r"^skipped training: it needs: compiler", output, re.MULTILINE), output


@pytest.mark.ray
def test_doctor_where_no_cluster_is(mpruner: Mpruner, tmp_path: Path) -> None:
    code, output = mpruner("doctor", "--address", "127.0.0.1:1", "--run-dir", tmp_path)
    assert code == 1
    assert "failed  Ray: Ray does not join the cluster at 127.0.0.1:1: " in output
    assert output.count("skipped") == 4
    assert "Traceback" not in output
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    code, output = mpruner("doctor", "--run-dir", tmp_path / "file")
    assert code == 2
    assert f"cannot write to {tmp_path / 'file'}: Not a directory" in output
