"""kill -9 at every stage: the same command goes on and ends with the same artefacts."""

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Mpruner, write_config
from safetensors.torch import load_file

pytestmark = pytest.mark.ray


def state_of(run: Path, stage: str) -> str | None:
    try:
        return json.loads((run / "manifest.json").read_text())["stages"][stage]["state"]
    except (OSError, KeyError):
        return None


def wait_for(condition: Any, process: Any, seconds: float = 150) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the moment to kill never came"
        time.sleep(0.02)


def kill_driver(process: Any) -> list[psutil.Process]:
    """kill -9 the driver; its workers must end by themselves, and Ray's agents, returned, a minute later."""
    children = psutil.Process(process.pid).children(recursive=True)
    agents = [child for child in children if "Agent" in child.name()]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs([child for child in children if child not in agents], timeout=60)
    assert alive == [], "left running after the driver was killed"
    return agents


def artefacts(run: Path) -> dict[str, Any]:
    evaluation = json.loads((run / "evaluation.json").read_text())
    for entry in evaluation.values():
        del entry["tokens_per_second"]
    files = {name: json.loads((run / name).read_text()) for name in ("cka.json", "plan.json", "retrain.json")}
    weights = {
        f"{folder}/{name}": tensor.tolist()
        for folder in ("pruned", "retrained")
        for shard in sorted((run / folder).glob("*.safetensors"))
        for name, tensor in load_file(shard).items()
    }
    return files | weights | {"evaluation": evaluation}


@pytest.mark.timeout(1200)
def test_killed_at_every_stage_it_ends_the_same(
    settings: dict[str, Any], start: Mpruner, mpruner: Any, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "config.yaml", settings)
    code, output = mpruner("run", config, "--run-dir", tmp_path / "undisturbed")
    assert code == 0, output

    run = tmp_path / "killed"
    moments = {
        "data": lambda: state_of(run, "data") == "running",
        "collect": lambda: list(run.glob("stats/*/from-*.safetensors")),  # in the middle: some sums are saved
        "plan": lambda: state_of(run, "collect") == "done",
        "rewrite": lambda: state_of(run, "rewrite") == "running",
        "rewrite shards": lambda: list(run.glob(".pruned.partial-*/*.safetensors")) or (run / "pruned").exists(),
        "retrain": lambda: list(run.glob("retrain/*/step-000002/mpruner.json")),  # in the middle of the steps
        "evaluate": lambda: list(run.glob("evaluation/*/original.json")),
        "report": lambda: state_of(run, "evaluate") == "done",
    }
    agents: list[psutil.Process] = []
    for moment, has_come in moments.items():
        process = start("run", config, "--run-dir", run)
        wait_for(has_come, process)
        agents += kill_driver(process)
        assert not (run / "report.html").exists(), f"too late to kill at {moment}"
    code, output = mpruner("run", config, "--run-dir", run)
    assert code == 0, output
    assert artefacts(run) == artefacts(tmp_path / "undisturbed")
    assert not list(run.rglob("*.tmp"))
    assert not list(run.glob(".*partial*"))
    _, alive = psutil.wait_procs(agents, timeout=120)
    assert alive == []


def test_a_worker_killed_while_it_collects_goes_on_from_the_saved_sums(
    settings: dict[str, Any], start: Mpruner, mpruner: Any, tmp_path: Path
) -> None:
    """Two workers; one is killed in the middle; the matrix is that of an undisturbed run with one."""
    settings["collect"] |= {"num_batches": 60, "save_every": 1}
    config = write_config(tmp_path / "config.yaml", settings)
    code, output = mpruner("collect", config, "--run-dir", tmp_path / "one")
    assert code == 0, output
    settings["cluster"]["workers"] = 2
    config = write_config(tmp_path / "config.yaml", settings)
    process = start("collect", config, "--run-dir", tmp_path / "two")
    wait_for(lambda: list((tmp_path / "two").glob("stats/*/from-*.safetensors")), process)
    workers = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if child.is_running() and "RayTrainWorker" in " ".join(child.cmdline())
    ]
    assert len(workers) == 2
    workers[0].kill()
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert re.search(r"collect: rank \d on \S+ was killed", output)
    assert "starting the workers again (1 of 2)" in output
    one, two = (json.loads((tmp_path / name / "cka.json").read_text()) for name in ("one", "two"))
    assert one == two
