"""Training that comes to nothing: what is noticed, and what the message says."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from test_retraining import config_for

from mpruner_dist.checkpoints.export import Exported
from mpruner_dist.cluster.worker import Worker
from mpruner_dist.errors import Fruitless, StageFailure
from mpruner_dist.retraining import job
from mpruner_dist.retraining.settings import most_overflows
from mpruner_dist.tasks import TASKS


def trainer_for(folder: Path, applied: bool = True, **options: Any) -> job.Trainer:
    config = config_for(folder, **options).retrain
    assert config is not None
    engine = SimpleNamespace(was_step_applied=lambda: applied, module=None)
    worker = Worker(0, 1, 0, 1, "cpu", folder, "retrain")
    return job.Trainer(worker, engine, TASKS["causal-lm"], None, config, folder / "work", 16)


def test_a_loss_that_is_not_finite_names_step_blocks_and_the_checkpoint_that_is_left(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, micro_batch_size=2)
    trainer.check(4, [True, True], [7, 3, 9, 1])
    with pytest.raises(StageFailure, match=r"step 5 is not finite \(training blocks \[1, 9\]\).*no sharded checkpoint"):
        trainer.check(4, [True, False], [7, 3, 9, 1])
    trainer.saved = 2
    with pytest.raises(StageFailure, match=r"blocks \[1, 3, 7, 9\].*checkpoint of step 2 is kept"):
        trainer.check(4, [False, False], [7, 3, 9, 1])


@pytest.mark.parametrize(("dtype", "way"), [("float16", "set model.dtype bfloat16 or"), ("bfloat16", "lower retrain")])
def test_single_overflows_pass_and_a_long_row_does_not(tmp_path: Path, dtype: str, way: str) -> None:
    trainer = trainer_for(tmp_path, applied=False)
    trainer.engine.module = torch.nn.Linear(1, 1, dtype=getattr(torch, dtype))
    for step in range(15):
        trainer.check(step, [True], [0])
    trainer.engine.was_step_applied = lambda: True
    trainer.check(15, [True], [0])
    trainer.engine.was_step_applied = lambda: False
    for step in range(15):
        trainer.check(step, [True], [0])
    with pytest.raises(StageFailure, match=rf"of 16 steps one after another, up to step 32, overflow {dtype}.*: {way}"):
        trainer.check(31, [True], [0])


@pytest.mark.parametrize("given", [{}, {"initial_scale_power": 32}, {"initial_scale_power": 10, "hysteresis": 1},
                                   {"min_loss_scale": 16, "hysteresis": 4}])  # fmt: skip
def test_as_many_overflows_pass_as_deepspeed_has_scales(given: dict[str, Any]) -> None:
    """The next one would be an error of its own, which says nothing of what to do."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    scaler = DynamicLossScaler(
        init_scale=2 ** given.get("initial_scale_power", 16), min_scale=given.get("min_loss_scale", 1),
        delayed_shift=given.get("hysteresis", 2), scale_window=1000, raise_error_at_min_scale=True, dtype=torch.half,
        consecutive_hysteresis=False,
    )  # fmt: skip
    with patch("deepspeed.comm.get_rank", lambda: 1):
        for _ in range(most_overflows({"fp16": {"enabled": True} | given})):
            scaler.update_scale(overflow=True)
        assert scaler.cur_scale == given.get("min_loss_scale", 1)
        with pytest.raises(Exception, match="already at minimum"):
            scaler.update_scale(overflow=True)


def test_training_that_moves_nothing_fails(tmp_path: Path) -> None:
    config = config_for(tmp_path).retrain
    assert config is not None
    job.require_change(Exported(trained_tensors=3, changed_tensors=1), config, [0.0])
    with pytest.raises(
        Fruitless, match=r"none of the 3 trained tensors has changed after 3 steps: raise .*learning_rate"
    ):
        job.require_change(Exported(trained_tensors=3), config, [0.0, 1e-9, 0.0])
