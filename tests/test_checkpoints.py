"""Sharded checkpoints: only what is whole is used, and training goes on from it with any number of workers."""

import json
import logging
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import make_model
from ranks import on_ranks

from mpruner_dist.cluster.worker import Worker
from mpruner_dist.errors import StageFailure, UserError
from mpruner_dist.retraining import checkpoints
from mpruner_dist.retraining.checkpoints import (
    find_checkpoint,
    load_checkpoint,
    loading_settings,
    read_facts,
    save_checkpoint,
    write_facts,
)
from mpruner_dist.retraining.resume import prepare_resume


class FakeEngine:
    """Saves two files, as DeepSpeed would: under a tag, with a script beside it."""

    module = torch.nn.Linear(2, 3)

    def zero_optimization_stage(self) -> int:
        return 1

    def save_checkpoint(self, folder: str, tag: str, **_: Any) -> None:
        target = Path(folder) / tag
        target.mkdir(parents=True)
        (target / "mp_rank_00_model_states.pt").write_text(f"weights of {tag}")
        (target.parent / "zero_to_fp32.py").touch()
        (target / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_text(f"moments of {tag}")


def one_worker(run: Path) -> Worker:
    return Worker(0, 1, 0, 1, "cpu", run.parent, "test")


def save_steps(run: Path, *steps: int, keep: int = 2) -> None:
    for step in steps:
        save_checkpoint(one_worker(run), FakeEngine(), run, step, keep)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


def newest(run: Path) -> tuple[int | None, list[str]]:
    told: list[str] = []
    facts = checkpoints.newest_whole(run, told.append)
    return facts and facts["step"], told


def test_the_newest_stay(tmp_path: Path) -> None:
    run = tmp_path / "run"
    save_steps(run, 2, 4, 6)
    (run / "universal-step-000004").mkdir()
    assert names(run) == ["step-000004", "step-000006", "universal-step-000004"]
    save_steps(run, 8)
    assert names(run) == ["step-000006", "step-000008"]
    save_steps(run, 10, keep=1)
    assert names(run) == ["step-000010"]
    assert newest(run) == (10, [])


MODEL_STATES = "step-000004/mp_rank_00_model_states.pt"
HARM: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (lambda run: (run / MODEL_STATES).write_text("weights"), "mp_rank_00_model_states.pt has 7 bytes of 22"),
    "other": (
        lambda run: (run / MODEL_STATES).write_text("Weights of step-000004"),
        "has other content than was saved",
    ),
    "gone": (lambda run: (run / MODEL_STATES).unlink(), "mp_rank_00_model_states.pt is missing"),
    "no facts": (lambda run: (run / "step-000004/mpruner.json").unlink(), "mpruner.json cannot be read"),
    "bad facts": (lambda run: (run / "step-000004/mpruner.json").write_text("[1]"), "mpruner.json cannot be read"),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_torn_checkpoint_is_noticed_and_the_one_before_used(tmp_path: Path, harm: str) -> None:
    run = tmp_path / "run"
    save_steps(run, 2, 4)
    HARM[harm][0](run)
    step, [told] = newest(run)
    assert step == 2
    assert f"{run}/step-000004 is torn" in told
    assert HARM[harm][1] in told
    assert "the one before is used" in told
    assert names(run) == ["step-000002", "step-000004.torn"]
    assert newest(run) == (2, [])
    save_steps(run, 3)  # a torn one does not count among the two that stay
    assert names(run) == ["step-000002", "step-000003"]


def test_no_whole_one_left(tmp_path: Path) -> None:
    run = tmp_path / "run"
    save_steps(run, 4)
    (run / MODEL_STATES).unlink()
    worker = one_worker(run)
    assert find_checkpoint(worker, run, {"zero_optimization": {"stage": 1}}) is None
    said = (tmp_path / ".test-said.txt").read_text()
    assert f"no whole checkpoint is left in {run}: retraining begins anew" in said


def test_a_checkpoint_of_another_run_or_architecture(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    save_steps(run, 2)
    shutil.copytree(run, other)
    with pytest.raises(UserError, match=r"other/step-000002 was saved by another run, run: move it out of"):
        newest(other)
    found = find_checkpoint(one_worker(run), run, {"zero_optimization": {"stage": 1}})
    engine = FakeEngine()
    engine.module = torch.nn.Linear(2, 4)
    with pytest.raises(UserError, match="parameters have other names or shapes than the pruned one"):
        load_checkpoint(one_worker(run), engine, run, found)


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DyingEngine(FakeEngine):
    def save_checkpoint(self, folder: str, tag: str, **_: Any) -> None:
        (Path(folder) / tag).mkdir(parents=True)
        (Path(folder) / tag / "mp_rank_00_model_states.pt").write_text("weig")
        die()


def save_and_die(run: Path, moment: str) -> None:
    engine = DyingEngine() if moment == "in the middle of a file" else FakeEngine()
    if moment == "before it is described":
        checkpoints.write_facts = die  # type: ignore[assignment]
    if moment == "before it is in its place":
        checkpoints.commit_folder = die  # type: ignore[assignment]
    if moment == "before older ones go":
        checkpoints._rotate = die  # type: ignore[assignment]
    save_checkpoint(one_worker(run), engine, run, 6, keep=1)


@pytest.mark.parametrize(
    ("moment", "step"),
    [
        ("in the middle of a file", 4),
        ("before it is described", 4),
        ("before it is in its place", 4),
        ("before older ones go", 6),
    ],
)
def test_a_worker_lost_while_it_saves(tmp_path: Path, moment: str, step: int) -> None:
    run = tmp_path / "run"
    save_steps(run, 4)
    child = multiprocessing.get_context("fork").Process(target=save_and_die, args=(run, moment))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert newest(run) == (step, [])
    assert not (run / "saving").exists()
    save_steps(run, 6, keep=1)
    assert names(run) == ["step-000006"]


def test_what_deepspeed_cannot_load_is_refused_before_anything_starts(tmp_path: Path) -> None:
    save_steps(tmp_path / "run", 2)
    reason = r"2 workers under ZeRO stage 0, and DeepSpeed's universal checkpoints are of ZeRO stage 1 to 3"
    with pytest.raises(UserError, match=f"run/step-000002 was saved by 1 worker under ZeRO stage 1.*{reason}") as error:
        prepare_resume(tmp_path / "run", {"zero_optimization": {"stage": 0}}, 2)
    assert f"delete {tmp_path / 'run'} to retrain from the start" in str(error.value)
    prepare_resume(tmp_path / "run", {"zero_optimization": {"stage": 1}}, 1)  # as it was saved: nothing to do


def test_an_optimizer_on_nvme_is_not_resumed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """DeepSpeed would go on without the moments, and say nothing."""
    on_nvme = {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "nvme"}}}
    prepare_resume(tmp_path / "run", on_nvme, 1)
    assert "with its optimizer on NVMe, a retraining cannot go on from its checkpoints" in caplog.text
    save_steps(tmp_path / "run", 2)
    refusal = f"run/step-000002 .* loads none of the moments.* Delete {tmp_path / 'run'} to retrain from the start"
    with pytest.raises(UserError, match=refusal):
        prepare_resume(tmp_path / "run", on_nvme, 1)
    prepare_resume(tmp_path / "run", {"zero_optimization": {"stage": 1}}, 1)
    checkpoint = tmp_path / "run/step-000002"
    facts, _ = read_facts(checkpoint)
    (checkpoint / "mpruner.json").unlink()
    (checkpoint / "offloaded_tensors_0").touch()
    write_facts(checkpoint, {key: value for key, value in facts.items() if key != "files"})
    with pytest.raises(UserError, match=refusal):
        prepare_resume(tmp_path / "run", {"zero_optimization": {"stage": 1}}, 1)


def test_what_the_converter_refuses(tmp_path: Path) -> None:
    save_steps(tmp_path / "run", 2)
    with pytest.raises(StageFailure, match=r"cannot convert .*Use cluster\.workers 1 and ZeRO stage 1 again"):
        prepare_resume(tmp_path / "run", {"zero_optimization": {"stage": 1}}, 2)


SETTINGS: dict[str, Any] = {
    "train_batch_size": 6,
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "scheduler": {
        "type": "WarmupCosineLR",
        "params": {"total_num_steps": 10, "warmup_num_steps": 2, "warmup_type": "linear"},
    },
}


def settings_for(stage: int) -> dict[str, Any]:
    # ZeRO stage 3 cuts a group into parts of this size: two in a model so small
    return SETTINGS | {"zero_optimization": {"stage": stage, "sub_group_size": 50_000}}


def train(run: Path, stage: int, saves_after: int | None = None) -> None:
    """Go on from what `run` holds to the sixth step; losses and learning rates to `run`/losses-STAGE.json."""
    import deepspeed

    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    worker = Worker(rank, ranks, rank, ranks, "cpu", run.parent, "test")
    kind = run.name.split("-")[0]
    settings = settings_for(stage)
    found = find_checkpoint(worker, run, settings)
    network = transformers.AutoModelForCausalLM.from_pretrained(run.parent.parent / "model", dtype=torch.float32)
    if kind == "frozen":
        network.model.layers[0].requires_grad_(False)
    parameters: Any = list(network.parameters())
    if kind == "groups":
        parameters = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.5},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0, "lr": 3e-3},
        ]
    config = loading_settings(found, settings)
    engine = deepspeed.initialize(model=network, model_parameters=parameters, config=config)[0]
    told = []
    first = load_checkpoint(worker, engine, run, found)
    for step in range(first, 6):
        total = torch.zeros(1, dtype=torch.float64)
        rows = torch.randint(3, 120, (6, 20), generator=torch.Generator().manual_seed(step))
        for row in rows[rank::ranks]:
            loss = engine(input_ids=row[None], labels=row[None]).loss
            total += loss.detach().double()
            engine.backward(loss)
            engine.step()
        told.append([step, worker.sum_over_workers(total).item() / 6, *engine.get_lr()])
        if step + 1 == saves_after:
            save_checkpoint(worker, engine, run, saves_after, keep=1)
    assert engine.global_steps == 6
    engine.destroy()
    if rank == 0:
        (run / f"losses-from-{first}.json").write_text(json.dumps(told))


BEGUN = ["plain-1", "plain-2", "plain-3", "groups-3", "frozen-1"]


def begin(root: Path) -> None:
    """On each kind and stage, six steps of which the third is saved; and once more from there."""
    for name in BEGUN:
        stage = int(name[-1])
        train(root / "begun" / name, stage, saves_after=3)
        train(root / "begun" / name, stage)


def go_on(root: Path, runs: list[tuple[str, int]]) -> None:
    for name, stage in runs:
        train(root / name, stage)


TRANSITIONS = {
    1: [("plain-1", 1), ("plain-2", 3), ("plain-3", 1), ("groups-3", 3)],
    3: [("plain-1", 2), ("plain-3", 3), ("groups-3", 2), ("frozen-1", 3)],
}


def test_training_goes_on_from_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With as many ranks exactly as if nothing had happened; with others, or another ZeRO stage, but for rounding."""
    caplog.set_level(logging.INFO)
    make_model("llama", tmp_path / "model", intermediate_size=57, tie_word_embeddings=True)  # 57 does not divide evenly
    on_ranks(2, begin, tmp_path)
    unbroken = {}
    for name in BEGUN:
        run = tmp_path / "begun" / name
        unbroken[name] = json.loads((run / "losses-from-0.json").read_text())
        assert json.loads((run / "losses-from-3.json").read_text()) == unbroken[name][3:], name
        (run / "losses-from-3.json").unlink()
    for ranks, runs in TRANSITIONS.items():
        root = tmp_path / f"ranks{ranks}"
        for name, stage in runs:
            shutil.copytree(tmp_path / "begun" / name, root / name)
            prepare_resume(root / name, settings_for(stage), ranks)
            assert names(root / name) == ["losses-from-0.json", "step-000003", "universal-step-000003"]
        on_ranks(ranks, go_on, root, runs)
        for name, stage in runs:
            after = json.loads((root / name / "losses-from-3.json").read_text())
            for (step, loss, *rates), (asked_step, asked_loss, *asked_rates) in zip(
                after, unbroken[name][3:], strict=True
            ):
                assert step == asked_step
                assert loss == pytest.approx(asked_loss, abs=5e-6), (ranks, name, stage)
                assert rates == pytest.approx(asked_rates, rel=1e-12), (ranks, name, stage)
    assert "step-000003, of 2 workers under ZeRO stage 3, for 1 worker under ZeRO stage 1" in caplog.text
