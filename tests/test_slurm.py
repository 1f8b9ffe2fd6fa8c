"""Real Slurm, two hosts: a run from `sbatch` to its report; what is lost on the way comes back, and nothing is left."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, make_text, settings_for, write_config
from slurm_cluster import SlurmCluster, wait_until, why_not

pytestmark = [pytest.mark.slurm, pytest.mark.ray, pytest.mark.skipif(bool(why_not()), reason=f"Slurm: {why_not()}")]
BATCHES, STEPS = 400, 60


@pytest.fixture(scope="module")
def slurm() -> Iterator[SlurmCluster]:
    cluster = SlurmCluster(nodes=2, cpus=2)
    cluster.environment |= {"MPRUNER_PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    yield cluster
    cluster.stop()


@pytest.fixture(scope="module")
def config(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is long enough to be disturbed; each worker fills a node."""
    folder = tmp_path_factory.mktemp("slurm run")
    make_text(folder / "text.jsonl", records=3000)
    settings = settings_for(tiny)
    for part in ("calibration", "train", "validation", "test"):
        settings["data"][part]["path"] = str(folder / "text.jsonl")
    settings["collect"] = {"batch_size": 2, "num_batches": BATCHES, "samples": 32, "save_every": 10}
    settings["retrain"] |= {"steps": STEPS, "save_every": 5, "eval_every": STEPS, "micro_batch_size": 1}
    settings["cluster"] = {"workers": 2, "device": "cpu", "cpus_per_worker": 2, "max_restarts": 8}
    return write_config(folder / "config.yaml", settings)


@pytest.fixture(scope="module")
def undisturbed(config: Path) -> Path:
    """The same run on this machine alone."""
    run = config.parent / "undisturbed"
    command = [sys.executable, "-m", "mpruner_dist", "run", str(config), "--run-dir", str(run)]
    subprocess.run([*command, "--set", "cluster.cpus_per_worker=1"], check=True, cwd=ROOT)
    return run


def submit(slurm: SlurmCluster, config: Path, run: Path, *options: str, settings: tuple[str, ...] = ()) -> str:
    script = str(ROOT / "slurm/prune.sbatch")
    sets = [word for setting in settings for word in ("--set", setting)]
    arguments = [str(config), "--run-dir", str(run), *sets]
    return slurm.run(
        "sbatch", "--parsable", "--cpus-per-task=2", *options, script, *arguments, cwd=config.parent
    ).strip()


def log_of(config: Path, job: str) -> str:
    path = config.parent / f"mpruner-{job}.log"
    return path.read_text() if path.exists() else ""


def numbers(run: Path) -> dict[str, Any]:
    """Everything that a run measured and that must not depend on what happened to it."""
    retrain = json.loads((run / "retrain.json").read_text())
    evaluation = json.loads((run / "evaluation.json").read_text())
    return {
        "cka": json.loads((run / "cka.json").read_text()),
        "kept": json.loads((run / "plan.json").read_text())["kept"],
        "loss": retrain["loss"],
        "test": {label: evaluation[label]["loss"] for label in ("original", "pruned", "retrained")},
    }


def assert_same(run: Path, undisturbed: Path) -> None:
    one, other = numbers(run), numbers(undisturbed)
    assert one["cka"] == other["cka"]
    assert one["kept"] == other["kept"]
    np.testing.assert_array_equal(one["loss"], other["loss"])
    assert one["test"] == other["test"]


def assert_nothing_is_left(slurm: SlurmCluster, job: str) -> None:
    wait_until(lambda: slurm.idle() == set(slurm.names), 60, "the nodes to be idle")
    for name in slurm.names:
        own = ("unshare", "bash -c", "slurmd")
        left = [command for command in slurm.processes_of(name).values() if not command.startswith(own)]
        assert left == []
    assert not Path(f"/tmp/mpruner-{os.getuid()}-{job}").exists()


def collected(run: Path) -> int:
    """Batches whose sums are saved."""
    files = (run / "stats").glob("*/from-*.safetensors")
    return sum(int(file.stem.split("-")[-1]) if file.stem.split("-")[-1].isdigit() else 1 for file in files)


def steps_done(run: Path) -> int:
    files = list((run / "retrain").glob("*/metrics.jsonl"))
    return len(files[0].read_text().splitlines()) if files else 0


def processes(slurm: SlurmCluster, node: str, pattern: str) -> list[int]:
    return [pid for pid, command in slurm.processes_of(node).items() if re.search(pattern, command)]


def kill(slurm: SlurmCluster, node: str, pattern: str) -> None:
    found = processes(slurm, node, pattern)
    assert found, slurm.processes_of(node)
    os.kill(found[0], signal.SIGKILL)


def test_a_run_on_two_hosts_is_that_of_one_machine(slurm: SlurmCluster, config: Path, undisturbed: Path) -> None:
    run = config.parent / "two hosts"
    job = submit(slurm, config, run, "--nodes=2")
    wait_until(lambda: collected(run), 120, "the first sums")
    environment = Path(f"/proc/{processes(slurm, 'n2', 'raylet/raylet')[0]}/environ").read_bytes().split(b"\0")
    token = next(line for line in environment if line.startswith(b"RAY_AUTH_TOKEN=")).partition(b"=")[2].decode()
    assert len(token) == 64
    assert not any(token in command for node in slurm.names for command in slurm.processes_of(node).values())
    slurm.wait_for(job)
    assert_same(run, undisturbed)
    assert "rank 0 on n1" in (run / "logs/collect-rank0.log").read_text()
    assert "rank 1 on n2" in (run / "logs/collect-rank1.log").read_text()
    assert_nothing_is_left(slurm, job)
    written = [file for file in [*run.rglob("*"), config.parent / f"mpruner-{job}.log"] if file.is_file()]
    assert not any(token.encode() in file.read_bytes() for file in written)
