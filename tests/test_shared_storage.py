"""Workers to which shared storage shows different files, as a network file system may for a while, do the same work."""

import json
import os
from pathlib import Path

import numpy as np
from conftest import make_model
from ranks import on_ranks

from mpruner_dist.cluster.worker import Worker
from mpruner_dist.config import Config
from mpruner_dist.data.blocks import Blocks
from mpruner_dist.data.parts import save_part
from mpruner_dist.evaluation.job import evaluate_job


def the_first_worker_decides(folder: Path) -> None:
    """Each rank has a folder of its own for what the others should see."""
    rank = int(os.environ["RANK"])
    worker = Worker(rank, 2, rank, 2, "cpu", folder, "evaluate")
    assert worker.select_on_first("abc", lambda letter: letter in ("ac", "b")[rank]) == ["a", "c"]
    assert worker.select_on_first([], bool) == []
    text = {"path": "text.txt"}
    content = {"model": {"path": str(folder)}, "data": {"calibration": text, "test": text | {"path": "other.txt"}}}
    spec = {
        "config": Config.model_validate(content), "models": {"original": folder, "pruned": folder}, "original": folder,
        "blocks": folder / "test.safetensors", "results": folder / f"results{rank}", "deepspeed": {}, "tasks": (),
    }  # fmt: skip
    evaluate_job(worker, spec)


def test_what_is_left_to_do_is_what_the_first_worker_sees(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    ids = np.random.default_rng(0).integers(3, 128, (5, 16)).astype(np.int32)
    save_part(tmp_path / "test.safetensors", Blocks(ids, np.full(5, 16, np.int32)))
    for rank, done in ((0, "original"), (1, "pruned")):
        (tmp_path / f"results{rank}").mkdir()
        (tmp_path / f"results{rank}" / f"{done}.json").write_text('"of an earlier attempt"')
    on_ranks(2, the_first_worker_decides, tmp_path)
    assert json.loads((tmp_path / "results0/original.json").read_text()) == "of an earlier attempt"
    assert json.loads((tmp_path / "results0/pruned.json").read_text())["tokens"] == 5 * 15
