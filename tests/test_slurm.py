"""Real Slurm, two hosts: a run from `sbatch` to its report; what is lost on the way comes back, and nothing is left."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, make_text, settings_for, write_config
from slurm_cluster import SlurmCluster, wait_until, why_not

pytestmark = [pytest.mark.slurm, pytest.mark.ray, pytest.mark.skipif(bool(why_not()), reason=f"Slurm: {why_not()}")]
BATCHES, STEPS = 200, 40
WORKER = "^ray::RayTrainWorker"


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
    assert list(Path("/tmp").glob(f"mpruner-{os.getuid()}-{job}-*")) == []


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
    logs = [(run / f"logs/collect-rank{rank}.log").read_text() for rank in range(2)]
    assert {re.search(r"rank \d on (n\d)", log)[1] for log in logs} == {"n1", "n2"}  # type: ignore[index]
    assert_nothing_is_left(slurm, job)
    written = [file for file in [*run.rglob("*"), config.parent / f"mpruner-{job}.log"] if file.is_file()]
    assert not any(token.encode() in file.read_bytes() for file in written)


def test_what_is_lost_on_the_way_comes_back(slurm: SlurmCluster, config: Path, undisturbed: Path) -> None:
    """Workers killed in collection and in retraining, the Ray of a node, and ten seconds without its network."""
    run = config.parent / "lost on the way"
    job = submit(slurm, config, run, "--nodes=2")
    wait_until(lambda: collected(run), 120, "the first sums")
    kill(slurm, "n2", WORKER)
    wait_until(lambda: "starting the workers again (1 of" in log_of(config, job), 60, "a new start")
    wait_until(lambda: processes(slurm, "n2", WORKER), 60, "workers")
    kill(slurm, "n2", "raylet/raylet")
    wait_until(lambda: "start 2 of" in (run / "logs/ray-n2.log").read_text(), 60, "Ray to start again on the node")
    before = collected(run)
    wait_until(lambda: collected(run) > before, 120, "more sums")
    slurm.link("n2", "down")
    time.sleep(10)
    slurm.link("n2", "up")
    wait_until(lambda: steps_done(run) >= 10, 240, "retraining")
    kill(slurm, "n1", WORKER)
    slurm.wait_for(job)
    assert_same(run, undisturbed)
    assert_nothing_is_left(slurm, job)


def test_a_job_that_is_preempted_or_loses_its_head_goes_on(
    slurm: SlurmCluster, config: Path, undisturbed: Path
) -> None:
    run = config.parent / "requeued"
    job = submit(slurm, config, run, "--nodes=2")
    wait_until(lambda: collected(run), 120, "the first sums")
    slurm.run("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    wait_until(lambda: "goes back into the queue" in log_of(config, job), 120, "the job to save")
    assert "mpruner got SIGUSR2" in log_of(config, job)
    assert json.loads((run / "manifest.json").read_text())["stages"]["collect"]["state"] == "running"
    wait_until(lambda: steps_done(run) >= 10, 300, "retraining")
    kill(slurm, "n1", "gcs_server")
    wait_until(lambda: "Ray ended under the command" in log_of(config, job), 120, "the loss of the head to be noticed")
    facts = slurm.wait_for(job)
    assert facts["Restarts"] == "2"
    assert_same(run, undisturbed)
    assert_nothing_is_left(slurm, job)


def test_a_node_without_network_is_done_without(slurm: SlurmCluster, config: Path, undisturbed: Path) -> None:
    """Slurm takes the node out and puts the job back; it goes on with one worker on the node that is left."""
    run = config.parent / "fewer nodes"
    job = submit(slurm, config, run, "--nodes=1-2", settings=("cluster.min_workers=1", "cluster.wait_s=10"))
    wait_until(lambda: steps_done(run) >= 10, 300, "retraining")
    assert slurm.facts(job)["NodeList"] == "n[1-2]"
    slurm.link("n2", "down")
    try:
        wait_until(lambda: slurm.facts(job)["NodeList"] == "n1", 180, "the job to begin again on one node")
        slurm.wait_for(job)
    finally:
        slurm.link("n2", "up")
        slurm.reboot("n2")  # Slurm waits for it to report
        wait_until(lambda: slurm.idle() == set(slurm.names), 60, "both nodes to be there again")
    one, other = numbers(run), numbers(undisturbed)
    assert one["cka"] == other["cka"]
    np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-4)


def test_a_time_limit_puts_a_job_back_and_scancel_ends_it(slurm: SlurmCluster, config: Path, undisturbed: Path) -> None:
    run = config.parent / "cancelled"
    job = submit(slurm, config, run, "--nodes=2", "--time=2", "--signal=B:USR2@90")
    wait_until(lambda: "goes back into the queue" in log_of(config, job), 180, "the time limit")
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    wait_until(lambda: "start 2, on" in log_of(config, job), 60, "the job to begin again")
    wait_until(lambda: processes(slurm, "n2", WORKER), 120, "workers")
    slurm.run("scancel", job)
    slurm.wait_for(job, ("CANCELLED",), 60)
    assert_nothing_is_left(slurm, job)
    assert "start 3" not in log_of(config, job)
    again = submit(slurm, config, run, "--nodes=2")
    slurm.wait_for(again)
    assert_same(run, undisturbed)
    assert_nothing_is_left(slurm, again)


def submit_by_command(slurm: SlurmCluster, config: Path, run: Path, *options: str) -> list[str]:
    command = (sys.executable, "-m", "mpruner_dist", "submit", "slurm", str(config), "--run-dir", str(run), *options)
    return re.findall(r"^job (\d+)", slurm.run(*command, cwd=config.parent), re.MULTILINE)


def test_a_sweep_collects_once_and_its_tasks_share_a_node(slurm: SlurmCluster, config: Path) -> None:
    run = config.parent / "sweep"
    small = ("retrain=null", "cluster.workers=1", "cluster.cpus_per_worker=1", "collect.num_batches=20")
    sets = [word for setting in small for word in ("--set", setting)]
    where = ("--", "--cpus-per-task=1", "--mem=3000", "--nodelist=n1")
    first, array = submit_by_command(slurm, config, run, *sets, "--sweep", "plan.keep_layers=5,6", *where)
    slurm.wait_for(first)
    wait_until(lambda: len(processes(slurm, "n1", "raylet/raylet")) == 2, 120, "both tasks")
    tasks = [slurm.facts(f"{array}_{number}") for number in range(2)]
    alone = next(task["ArrayTaskId"] for task in tasks if task["JobId"] == array)  # its number is the array's too
    slurm.run("scancel", "--batch", "--signal=USR2", f"{array}_{alone}")
    tasks = [slurm.wait_for(f"{array}_{number}") for number in range(2)]
    assert {task["ArrayTaskId"]: task["Restarts"] for task in tasks} == {alone: "1", str(1 - int(alone)): "0"}
    similarities = (run / "cka.json").read_text()
    for keep in (5, 6):
        folder = run.with_name(f"sweep-plan.keep_layers-{keep}")
        assert len(json.loads((folder / "plan.json").read_text())["kept"]) == keep
        assert (folder / "cka.json").read_text() == similarities
        assert (folder / "report.html").exists()
        assert not (folder / "stats").exists()


def test_a_chain_prunes_on_one_node_and_retrains_on_two(slurm: SlurmCluster, config: Path) -> None:
    run = config.parent / "chain"
    sets = ("--set", "cluster.cpus_per_worker=1", "--set", "collect.num_batches=20", "--set", "retrain.steps=5")
    first, second = submit_by_command(
        slurm, config, run, *sets, "--then", "retrain", "--then-nodes", "2", "--", "--cpus-per-task=2", "--gres=gpu:2"
    )
    assert slurm.wait_for(first)["NumNodes"] == "1"
    assert (run / "pruned").exists()
    assert slurm.wait_for(second)["NumNodes"] == "2"
    assert (run / "retrained/config.json").exists()
    assert "collect   done before" in log_of(config, second)
    assert "Ray with --num-cpus=2 --num-gpus=2" in (run / "logs/ray-n2.log").read_text()


def test_what_slurm_does_not_know_is_said(slurm: SlurmCluster, config: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)exited with 2.*unrecognized option '--qoss=long'"):
        submit_by_command(slurm, config, config.parent / "refused", "--", "--qoss=long")
    with pytest.raises(RuntimeError, match=r"(?s)exited with 2.*invalid partition"):
        submit_by_command(slurm, config, config.parent / "refused", "--partition", "fast", "--dry-run")
    assert not (config.parent / "refused").exists()
