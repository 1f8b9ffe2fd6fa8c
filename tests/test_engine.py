"""DeepSpeed engines: what they leave behind, and what a killed compilation leaves."""

import gc
import json
import os
import time
import weakref
from pathlib import Path

import pytest
import torch
from conftest import make_model
from ranks import on_ranks

from mpruner_dist.cluster import engine as engines
from mpruner_dist.cluster.engine import _alone_in, let_go
from mpruner_dist.cluster.settings import inference_settings
from mpruner_dist.config import ModelConfig
from mpruner_dist.models.engines import inference_engine


def load_and_let_go(folder: Path, stage: int) -> None:
    """Two engines, one after the other, as in evaluation; says what is left of each."""
    left = []
    for _ in range(2):
        settings = inference_settings({}, stage, "float32")
        engine = inference_engine(settings, folder / "model", ModelConfig(path="model"), print)
        engine(input_ids=torch.ones(1, 4, dtype=torch.long))
        weight = weakref.ref(next(engine.module.parameters()))
        assert all(buffer.device == engine.device for buffer in engine.module.buffers())
        let_go(engine)
        del engine
        gc.collect()
        left.append(weight() is not None)
    (folder / f"left{torch.distributed.get_rank()}.json").write_text(json.dumps(left))


@pytest.mark.parametrize("stage", [0, 3])
def test_nothing_is_left_of_an_engine(tmp_path: Path, stage: int) -> None:
    make_model("llama", tmp_path / "model", num_hidden_layers=2)
    on_ranks(2, load_and_let_go, tmp_path, stage)
    assert [json.loads((tmp_path / f"left{rank}.json").read_text()) for rank in range(2)] == 2 * [[False, False]]


def test_a_killed_compilation_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would wait for ever for the file that the killed process left."""
    (tmp_path / "lock").touch()
    os.utime(tmp_path / "lock", (0, time.time() - 1000))
    with _alone_in(tmp_path):
        assert not (tmp_path / "lock").exists()
    monkeypatch.setattr(engines, "LONGEST_COMPILATION_S", 2)
    (tmp_path / "lock").touch()  # perhaps another program that is at work
    begun = time.monotonic()
    with _alone_in(tmp_path):
        assert time.monotonic() - begun > 1
        assert not (tmp_path / "lock").exists()
