"""Signals to workers and to the command in the stages that take time: exit 75, and the same command ends the same."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Mpruner, make_text, write_config
from safetensors.torch import load_file
from test_resume import wait_for

from mpruner_dist.logs import read_progress

pytestmark = pytest.mark.ray


def retrained(run: Path) -> dict[str, Any]:
    weights = {name: tensor.tolist() for path in (run / "retrained").glob("*.safetensors")
               for name, tensor in load_file(path).items()}  # fmt: skip
    return weights | json.loads((run / "retrain.json").read_text())


def worker_of(process: Any, run: Path, stage: str, rank: int) -> int:
    """The process whose output goes to the log of this rank."""
    for child in psutil.Process(process.pid).children(recursive=True):
        log = run / "logs" / f"{stage}-rank{rank}.log"
        if child.is_running() and os.path.realpath(f"/proc/{child.pid}/fd/2") == str(log):
            return child.pid
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.timeout(1800)
def test_preempted_in_every_stage_it_ends_the_same(
    settings: dict[str, Any], start: Mpruner, mpruner: Any, tmp_path: Path
) -> None:
    make_text(tmp_path / "text.jsonl", records=4000)
    for part in ("calibration", "train", "validation", "test"):
        settings["data"][part]["path"] = str(tmp_path / "text.jsonl")
    settings["cluster"]["workers"] = 2
    settings["collect"] |= {"num_batches": 600, "save_every": 1000}  # only a signal makes them save
    settings["retrain"] |= {"steps": 400, "save_every": 1000, "eval_every": 50, "distillation": None}
    settings["evaluate"] |= {"max_blocks": 600, "batch_size": 1}  # long enough for a signal in the middle
    config = write_config(tmp_path / "config.yaml", settings)
    code, output = mpruner("retrain", config, "--run-dir", tmp_path / "undisturbed")
    assert code == 0, output

    run = tmp_path / "run"

    def steps() -> int:
        return sum(path.read_text().count("\n") for path in run.glob("retrain/*/metrics.jsonl"))

    def progress(stage: str) -> bool:
        state = read_progress(run / "logs/progress.json")
        return state is not None and stage in state["label"] and state["done"] > 10

    moments = [
        ("collect", lambda: progress("collect"), "driver", "the sums of all batches that were done are saved"),
        ("retrain", lambda: steps() > 10, 1, "is saved"),
        ("evaluate", lambda: progress("evaluate pruned"), 1, "the results of the models before are saved"),
    ]
    for stage, has_come, whom, what in moments:
        process = start("run", config, "--run-dir", run)
        wait_for(has_come, process, seconds=400)  # Ray workers are niced: they wait long on a busy machine
        os.kill(process.pid if whom == "driver" else worker_of(process, run, stage, 1), signal.SIGTERM)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 75, output
        who = "mpruner got SIGTERM" if whom == "driver" else f"rank 1 on {os.uname().nodename} got SIGTERM"
        assert f"mpruner: {stage}: {who}; " in output
        assert what in output
        assert "the same command goes on" in output
        assert "starting the workers again" not in output
        if stage == "collect":
            assert len(list(run.glob("stats/*/from-*.safetensors"))) == 2  # one of each worker
    assert sorted(path.name for path in run.glob("evaluation/*/*.json")) == ["original.json"]
    code, output = mpruner("run", config, "--run-dir", run)
    assert code == 0, output
    assert (run / "cka.json").read_text() == (tmp_path / "undisturbed/cka.json").read_text()
    assert retrained(run) == retrained(tmp_path / "undisturbed")
