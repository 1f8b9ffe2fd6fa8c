"""kill -9, or Ctrl-C, in every stage that takes time: the same command goes on and ends with the same artefacts."""

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from collecting import collected
from conftest import Mpruner, make_text, write_config
from safetensors.torch import load_file

from mpruner_dist.config import Config

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


def train_workers(process: Any) -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if child.is_running() and "RayTrainWorker" in " ".join(child.cmdline())
    ]


@pytest.fixture(scope="module")
def agents() -> Iterator[list[psutil.Process]]:
    """Ray's agents of killed drivers, which must end by themselves, a minute later."""
    agents: list[psutil.Process] = []
    yield agents
    _, alive = psutil.wait_procs(agents, timeout=120)
    assert alive == []


def kill_driver(process: Any, agents: list[psutil.Process], *with_it: psutil.Process) -> None:
    """kill -9 the driver; its workers must end by themselves."""
    children = psutil.Process(process.pid).children(recursive=True)
    agents += [child for child in children if "Agent" in child.name()]
    os.kill(process.pid, signal.SIGKILL)
    for worker in with_it:
        worker.kill()
    process.wait()
    _, alive = psutil.wait_procs([child for child in children if child not in agents], timeout=60)
    assert alive == [], "left running after the driver was killed"


def interrupt(process: Any) -> None:
    """Ctrl-C."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "interrupted; what was saved is kept, and the same command goes on" in output
    assert "Traceback" not in output
    _, alive = psutil.wait_procs(children, timeout=60)
    assert alive == [], "left running after Ctrl-C"


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
    settings: dict[str, Any], finished: Path, agents: list[psutil.Process], start: Mpruner, mpruner: Any, tmp_path: Path
) -> None:
    config, run = write_config(tmp_path / "config.yaml", settings), tmp_path / "killed"
    moments = {
        "collect": lambda: list(run.glob("stats/*/from-*.safetensors")),  # in the middle: some sums are saved
        "rewrite": lambda: list(run.glob(".pruned.partial-*/*.safetensors")) or (run / "pruned").exists(),
        "retrain": lambda: list(run.glob("retrain/*/step-000002/mpruner.json")),  # in the middle of the steps
        "evaluate": lambda: list(run.glob("evaluation/*/original.json")),
    }
    for moment, has_come in moments.items():
        process = start("run", config, "--run-dir", run)
        wait_for(has_come, process)
        if moment == "evaluate":
            interrupt(process)
        else:
            kill_driver(process, agents)
        assert not (run / "report.html").exists(), f"too late to kill at {moment}"
    code, output = mpruner("run", config, "--run-dir", run)
    assert code == 0, output
    assert artefacts(run) == artefacts(finished)
    assert not list(run.rglob("*.tmp"))
    assert not list(run.glob(".*partial*"))


@pytest.fixture
def many_batches(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The configuration of a longer collection."""
    settings["collect"] |= {"num_batches": 400, "save_every": 1}
    settings["retrain"] = None
    make_text(tmp_path / "text.jsonl", records=3000)
    for part in ("calibration", "train", "validation", "test"):
        settings["data"][part]["path"] = str(tmp_path / "text.jsonl")
    return settings


def expect_as_undisturbed(run: Path, settings: dict[str, Any]) -> None:
    """Every number of its `cka.json` is what one rank finds that nobody disturbs."""
    content = json.loads((run / "cka.json").read_text())
    config, blocks = Config.model_validate(settings), run / "data/calibration.safetensors"
    alone = collected(run / "alone", 1, config, blocks, content["layers"])
    assert content == alone


def test_begun_with_two_workers_and_ended_with_three(
    many_batches: dict[str, Any], agents: list[psutil.Process], start: Mpruner, mpruner: Any, tmp_path: Path
) -> None:
    """A killed node takes driver and workers in the middle."""
    config, run = write_config(tmp_path / "config.yaml", many_batches), tmp_path / "two"
    process = start("collect", config, "--run-dir", run, "--set", "cluster.workers=2")
    wait_for(lambda: list(run.glob("stats/*/from-*.safetensors")), process)
    # workers that live on until they notice the driver's end may have saved everything by then
    kill_driver(process, agents, *train_workers(process))
    saved = {path: path.stat().st_mtime_ns for path in run.glob("stats/*/from-*.safetensors")}
    assert 0 < len(saved) < 400
    code, output = mpruner("collect", config, "--run-dir", run, "--set", "cluster.workers=3")
    assert code == 0, output
    assert all(path.stat().st_mtime_ns == when for path, when in saved.items())
    expect_as_undisturbed(run, many_batches)


def test_a_worker_killed_while_it_collects_goes_on_from_the_saved_sums(
    many_batches: dict[str, Any], start: Mpruner, tmp_path: Path
) -> None:
    config, run = write_config(tmp_path / "config.yaml", many_batches), tmp_path / "two"
    process = start("collect", config, "--run-dir", run, "--set", "cluster.workers=2")
    wait_for(lambda: list(run.glob("stats/*/from-*.safetensors")), process)
    workers = train_workers(process)
    assert len(workers) == 2
    workers[0].kill()
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert re.search(r"collect: rank \d on \S+ was killed at batch \d+ ", output)
    assert "starting the workers again (1 of 2)" in output
    expect_as_undisturbed(run, many_batches)
