"""Why workers ended, from what Ray Train says and what they left word of."""

import json
import signal
from pathlib import Path

import pytest
import torch
from ray.exceptions import RayTaskError
from ray.train import ControllerError, WorkerGroupError

from mpruner_dist.cluster.failures import explain
from mpruner_dist.cluster.preemption import asking_first, stop_on_signals
from mpruner_dist.cluster.worker import worker_note
from mpruner_dist.errors import Preempted, StageFailure


def test_what_ray_wraps_is_told_by_its_cause(tmp_path: Path) -> None:
    """Without it there would stand a process and its number only, in colours."""
    cause = RuntimeError("Distributed package doesn't have NCCL built in")
    wrapped = RayTaskError("setup", "Traceback: as long as it is", cause, pid=7, ip="10.0.0.1", proctitle="ray::Worker")
    said = explain(ControllerError(wrapped), "collect", tmp_path, 2, joined=False)
    assert said == "collect: the workers did not start (Distributed package doesn't have NCCL built in)"


def test_a_gpu_that_is_full_is_told_with_what_to_lower(tmp_path: Path) -> None:
    for stage in ("retrain", "collect", "plan"):
        note = worker_note(tmp_path, stage, 1)
        note.parent.mkdir(exist_ok=True)
        note.write_text(json.dumps({"host": "n7", "doing": "step 3", "raised": "OutOfMemoryError", "when": 1.0}))
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 12.50 GiB.\nmore")
    said = r"rank 1 on n7 failed at step 3: CUDA out of memory\. Tried .* GiB\. Lower "
    with pytest.raises(StageFailure, match=f"{said}retrain.micro_batch_size, or evaluate"):
        explain(WorkerGroupError("failed", {1: full}), "retrain", tmp_path, 2, joined=True)
    for stage, batch in (("collect", "collect.batch_size, or divide"), ("plan", "evaluate.batch_size, or divide")):
        with pytest.raises(StageFailure, match=said + batch):
            explain(WorkerGroupError("failed", {1: full}), stage, tmp_path, 2, joined=True)


def test_a_worker_without_room_for_its_note_was_not_killed(tmp_path: Path) -> None:
    note = worker_note(tmp_path, "retrain", 0)
    note.parent.mkdir(exist_ok=True)
    note.write_text(json.dumps({"host": "n7", "doing": "step 3"}))
    full = StageFailure("no space left in /runs/mine")
    with pytest.raises(StageFailure, match="rank 0 on n7 failed at step 3: no space left in /runs/mine"):
        explain(WorkerGroupError("failed", {0: full}), "retrain", tmp_path, 2, joined=False)


def test_what_fails_because_the_signal_reached_it_too_was_stopped() -> None:
    """A Ray job's stop goes to all of its processes."""

    def convert(told: bool) -> None:
        if told:
            signal.raise_signal(signal.SIGTERM)
        raise StageFailure("DeepSpeed cannot convert the checkpoint")

    with pytest.raises(Preempted, match="stopped by SIGTERM"), stop_on_signals(), asking_first(None):
        convert(told=True)
    with pytest.raises(StageFailure, match="cannot convert"), stop_on_signals(), asking_first(None):
        convert(told=False)
