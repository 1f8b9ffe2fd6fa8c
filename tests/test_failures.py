"""Why workers ended, from what Ray Train says and what they left word of."""

import json
from pathlib import Path

import pytest
import torch
from ray.exceptions import RayTaskError
from ray.train import ControllerError, WorkerGroupError

from mpruner_dist.cluster.failures import explain
from mpruner_dist.cluster.worker import worker_note
from mpruner_dist.errors import StageFailure


def test_what_ray_wraps_is_told_by_its_cause(tmp_path: Path) -> None:
    """Without it there would stand a process and its number only, in colours."""
    cause = RuntimeError("Distributed package doesn't have NCCL built in")
    wrapped = RayTaskError("setup", "Traceback: as long as it is", cause, pid=7, ip="10.0.0.1", proctitle="ray::Worker")
    said = explain(ControllerError(wrapped), "collect", tmp_path, 2, joined=False)
    assert said == "collect: the workers did not start (Distributed package doesn't have NCCL built in)"


def test_a_gpu_that_is_full_is_told_with_what_to_lower(tmp_path: Path) -> None:
    note = worker_note(tmp_path, "retrain", 1)
    note.parent.mkdir(exist_ok=True)
    note.write_text(json.dumps({"host": "n7", "doing": "step 3", "raised": "OutOfMemoryError", "when": 1.0}))
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 12.50 GiB.\nmore")
    said = r"rank 1 on n7 failed at step 3: CUDA out of memory\. Tried .* GiB\. Lower .*micro_batch_size"
    with pytest.raises(StageFailure, match=said):
        explain(WorkerGroupError("failed", {1: full}), "retrain", tmp_path, 2, joined=True)
