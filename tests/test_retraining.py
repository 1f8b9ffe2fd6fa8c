"""The whole job of retraining on real ranks, without Ray: what is trained, by which teacher, and what is exported."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from ranks import on_ranks
from safetensors.torch import load_file

from mpruner_dist.checkpoints.folder import read_checkpoint
from mpruner_dist.cluster.worker import Worker
from mpruner_dist.config import Config, DistillationConfig
from mpruner_dist.data.blocks import Blocks
from mpruner_dist.data.parts import load_part, save_part
from mpruner_dist.errors import Fruitless, UserError
from mpruner_dist.models.loading import load_model
from mpruner_dist.retraining import job
from mpruner_dist.retraining.freezing import beside_gaps
from mpruner_dist.retraining.hidden import HiddenStates
from mpruner_dist.retraining.losses import Answer, likely_words, mixed_loss
from mpruner_dist.retraining.settings import DataOrder
from mpruner_dist.rewriting.rewrite import rewrite_checkpoint
from mpruner_dist.tasks import TASKS

KEPT, DEPTH = [0, 1, 4, 5], 6
STEPS = 3
ZERO3 = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 1000}
FAMILY = {"num_hidden_layers": DEPTH, "tie_word_embeddings": True, "spread": 0.1, "vocab_size": 40_000}
"""Half of its embeddings is more than the megabyte below which DeepSpeed puts nothing on NVMe."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a gap after its second layer, in `pruned`; the whole of it in `model`; blocks of text."""
    folder = tmp_path_factory.mktemp("retraining")
    make_model("llama", folder / "model", **FAMILY)
    rewrite_checkpoint(folder / "model", folder / "pruned", KEPT)
    draw = torch.Generator().manual_seed(0)
    for part, count in (("train", 70), ("validation", 3)):
        ids = torch.randint(3, 128, (count, 16), generator=draw, dtype=torch.int32).numpy()
        lengths = torch.randint(3, 17, (count,), generator=draw, dtype=torch.int32).numpy()
        save_part(folder / f"{part}.safetensors", Blocks(ids, lengths))
    return folder


def config_for(folder: Path, dtype: str = "float32", **retrain: Any) -> Config:
    data = {part: {"path": f"{part}.txt"} for part in ("calibration", "train", "validation", "test")}
    return Config.model_validate({
        "model": {"path": str(folder / "model"), "dtype": dtype},
        "data": data,
        "retrain": {
            "steps": STEPS, "batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 0, "save_every": STEPS, **retrain,
        },
    })  # fmt: skip


def retrain(folder: Path, name: str, deepspeed: dict[str, Any], layers: list[int] | None = None, **options: Any) -> Any:
    """Run the job on this rank with the others; what it recorded, by the first of them."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    run = folder / "runs" / name
    (run / "logs").mkdir(parents=True, exist_ok=True)
    words = run / "words"
    words.mkdir(exist_ok=True)
    worker = Worker(rank, size, rank, size, "cpu", run / "logs", "retrain")
    spec = {
        "config": config_for(folder, **options), "pruned": folder / "pruned", "layers": layers, "words": words,
        "teacher": folder / "model", "teacher_layers": KEPT, "train": folder / "train.safetensors",
        "validation": folder / "validation.safetensors", "work": run / "work", "target": run / "retrained",
        "deepspeed": deepspeed,
    }  # fmt: skip
    job.retrain_job(worker, spec)
    worker.barrier()
    if worker.is_first:
        job.write_summary(run / "work", run / "retrain.json")
    worker.barrier()
    return json.loads((run / "retrain.json").read_text())


def losses_of(summary: dict[str, Any]) -> list[float]:
    return [loss for _, loss in summary["loss"] + summary["validation_loss"]]


def changed(folder: Path, name: str) -> set[str]:
    before, after = load_file(folder / "pruned/model.safetensors"), exported(folder, name)
    assert before.keys() == after.keys()
    return {tensor for tensor, value in before.items() if not torch.equal(value, after[tensor])}


def exported(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / "runs" / name / "retrained/model.safetensors")


def first_loss(folder: Path, distillation: dict[str, Any]) -> float:
    """Of the first step, a token, by transformers alone."""
    blocks = load_part(folder / "train.safetensors")
    blocks = blocks.rows(DataOrder(len(blocks), 4, 0).rows(0))
    batch, config = (
        TASKS["causal-lm"].batch(blocks, torch.device("cpu")),
        DistillationConfig.model_validate(distillation),
    )
    logits, states = [], []
    for name, layers in (("pruned", range(len(KEPT))), ("model", KEPT)):
        model = load_model(folder / name, "float32")
        taken: dict[int, torch.Tensor] = {}
        for layer in layers:
            model.model.layers[layer].register_forward_hook(lambda *hook, n=layer, to=taken: to.update({n: hook[-1]}))
        with torch.no_grad():
            logits.append(model(**batch.inputs).logits)
        states.append([taken[layer] for layer in layers])
    answer = Answer(None, likely_words(logits[1], config.top_k or 0, config.temperature), states[1])
    return float(mixed_loss(logits[0], states[0], answer, batch, config)) / int((blocks.lengths - 1).sum())


def expect_the_same_from_its_checkpoint(folder: Path, name: str, *arguments: Any, **options: Any) -> None:
    """Started again after all steps, the job has its sharded checkpoint and nothing else."""
    before = exported(folder, name)
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        (folder / "runs" / name / "retrained").rename(folder / "runs" / name / "first")
    torch.distributed.barrier()
    retrain(folder, name, *arguments, **options)
    after = exported(folder, name)
    assert all(torch.equal(value, after[tensor]) for tensor, value in before.items())


def every_stage_trains_the_same(folder: Path, nvme: bool) -> None:
    """Number types aside: the stages, offloading and activation checkpointing."""
    distillation = {"weight": 0.3, "hidden_weight": 0.2, "temperature": 2.0, "top_k": 5}
    expected = retrain(folder, "one", {}, distillation=distillation)
    assert expected["loss"][0][1] == pytest.approx(first_loss(folder, distillation), rel=1e-4)
    offload = {"offload_optimizer": {"device": "cpu"}}
    runs: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "stage 1, activations": ({}, {"activation_checkpointing": True}),
        "stage 2, optimizer in memory": ({"zero_optimization": {"stage": 2, **offload}}, {}),
        "stage 3, activations": ({"zero_optimization": ZERO3}, {"activation_checkpointing": True}),
        "stage 3, all in memory": ({"zero_optimization": ZERO3 | offload | {"offload_param": {"device": "cpu"}}}, {}),
    }
    if nvme:
        disk = {"device": "nvme", "nvme_path": str(folder / "nvme")}
        buffers = {"buffer_count": 2, "buffer_size": 4_000_000}
        both = {"offload_optimizer": disk, "offload_param": disk | buffers}
        runs["stage 3, all on disk"] = ({"zero_optimization": ZERO3 | both}, {})
    for name, (deepspeed, more) in runs.items():
        got = retrain(folder, name, deepspeed, distillation=distillation, **more)
        torch.testing.assert_close(
            losses_of(got), losses_of(expected), rtol=1e-4, atol=1e-4, msg=lambda m, n=name: n + m
        )
        for tensor, value in exported(folder, "one").items():
            torch.testing.assert_close(exported(folder, name)[tensor], value, rtol=1e-2, atol=2e-3)
        assert got["weights"]["trained_parameters"] == read_checkpoint(folder / "pruned").num_parameters
    if nvme:
        found = [file for file in (folder / "nvme").rglob("*.swp") if file.stat().st_size > 1_000_000]
        assert {"teacher", "float32params", "optimizer"} <= {part for file in found for part in file.parts}


def what_is_frozen_stays(folder: Path) -> None:
    layers = beside_gaps(KEPT, [DEPTH])
    assert layers == [1, 2]
    names = load_file(folder / "pruned/model.safetensors")
    beside = {name for name in names if name.startswith(("model.layers.1.", "model.layers.2."))}
    for stage in (1, 2, 3):
        zero = {"zero_optimization": ZERO3 if stage == 3 else {"stage": stage}}
        got = retrain(folder, f"neighbours {stage}", zero, layers, trainable="neighbours", weight_decay=0.1)
        assert changed(folder, f"neighbours {stage}") == beside
        counts = got["weights"]
        assert counts["trained_tensors"] == counts["changed_tensors"] == len(beside)
        assert counts["frozen_tensors"] == counts["proved_tensors"] == len(names) - len(beside)
        total = read_checkpoint(folder / "pruned").num_parameters
        assert counts["trained_parameters"] + counts["frozen_parameters"] == total
    options = {"trainable": "neighbours", "weight_decay": 0.1}
    expect_the_same_from_its_checkpoint(folder, "neighbours 3", {"zero_optimization": ZERO3}, layers, **options)
    one, three = (losses_of(json.loads((folder / f"runs/neighbours {n}/retrain.json").read_text())) for n in (1, 3))
    torch.testing.assert_close(one, three, rtol=1e-4, atol=1e-4)


def adapters_are_trained(folder: Path) -> None:
    found = []
    for name, zero, layers, more in (
        ("lora 1", {"stage": 1}, None, {}),
        ("lora 3", ZERO3, None, {"activation_checkpointing": True}),
        ("lora beside", ZERO3, [1, 2], {"dtype": "bfloat16"}),
    ):
        lora = {"rank": 3, "alpha": 12.0, "targets": ["q_proj", "mlp.up_proj"]}
        got = retrain(folder, name, {"zero_optimization": zero}, layers, lora=lora, **more)
        found.append(losses_of(got))
        merged = {f"model.layers.{layer}.{projection}.weight" for layer in layers or range(len(KEPT))
                  for projection in ("self_attn.q_proj", "mlp.up_proj")}  # fmt: skip
        assert changed(folder, name) == merged
        if name != "lora 3":
            expect_the_same_from_its_checkpoint(folder, name, {"zero_optimization": zero}, layers, lora=lora, **more)
        counts = got["weights"]
        assert counts["trained_tensors"] == len(merged)
        assert counts["proved_tensors"] == counts["frozen_tensors"] + len(merged)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
    for tensor, value in exported(folder, "lora 1").items():
        torch.testing.assert_close(exported(folder, "lora 3")[tensor], value, rtol=1e-2, atol=2e-3)
    with pytest.raises(
        UserError, match=r"no layer has a projection 'proj' \(did you mean .*; there are mlp\.down_proj, .*q_proj"
    ):
        retrain(folder, "lora wrong", {}, lora={"targets": ["proj"]})
    if not torch.ops.mkldnn._is_mkldnn_fp16_supported():  # few processors do
        with pytest.raises(UserError, match="does not compute in float16"):
            retrain(folder, "halves", {}, dtype="float16")


def cached_words_teach_the_same(folder: Path) -> None:
    """37 of 70 blocks: two files for two workers, the second shorter."""
    few = {"weight": 0.5, "temperature": 2.0, "top_k": 5}
    more = {"steps": 12, "save_every": 12}
    live = retrain(folder, "live", {"zero_optimization": ZERO3}, distillation=few, **more)
    cached = retrain(folder, "cached", {"zero_optimization": ZERO3}, distillation=few | {"cache": True}, **more)
    torch.testing.assert_close(losses_of(cached), losses_of(live), rtol=1e-4, atol=1e-4)
    files = sorted((folder / "runs/cached/words").iterdir())
    used = DataOrder(len(load_part(folder / "train.safetensors")), 4, 0).used(12)
    assert 32 < len(used) < 64
    assert [len(load_file(file)["words"]) for file in files] == [32, len(used) - 32]
    before = [file.stat().st_mtime_ns for file in files]
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        (folder / "runs/words-again").mkdir(parents=True)
        (folder / "runs/cached/words").rename(folder / "runs/words-again/words")
        (folder / "runs/words-again/words" / files[0].name).unlink()
    torch.distributed.barrier()
    again = retrain(folder, "words-again", {}, distillation=few | {"cache": True}, **more)  # one is there, one is not
    torch.testing.assert_close(losses_of(again), losses_of(live), rtol=1e-4, atol=1e-4)
    kept = sorted((folder / "runs/words-again/words").iterdir())
    assert kept[1].stat().st_mtime_ns == before[1]
    assert kept[0].stat().st_mtime_ns != before[0]


def all_in_turn(folder: Path) -> None:
    """One after another in the same processes: to start them takes longer than any."""
    what_is_frozen_stays(folder)
    adapters_are_trained(folder)
    cached_words_teach_the_same(folder)


def test_stages_offloading_and_activation_checkpointing_train_the_same(models: Path) -> None:
    with_nvme = Path("/usr/include/libaio.h").exists()
    on_ranks(2, every_stage_trains_the_same, models, with_nvme)
    if not with_nvme:
        pytest.skip("all but the states on NVMe, which need the package libaio-dev")


def test_frozen_layers_adapters_and_cached_teachers(models: Path) -> None:
    on_ranks(2, all_in_turn, models)


def test_the_layers_beside_gaps() -> None:
    assert beside_gaps([0, 1, 4, 5], [6]) == [1, 2]
    assert beside_gaps([0, 2, 4], [5]) == [0, 1, 2]
    assert beside_gaps([0, 1, 2, 5, 6, 8], [9]) == [2, 3, 4, 5]
    assert beside_gaps([2, 3, 4], [5]) == [0]
    assert beside_gaps([0, 1, 5, 6, 7, 8], [5, 4]) == [1]  # the next is of another stack
    assert beside_gaps([0, 1, 2, 3, 5, 6], [3, 4]) == [3, 4]
    assert beside_gaps([0, 1, 2], [5]) == [2]
    with pytest.raises(UserError, match=r"set retrain\.trainable all"):
        beside_gaps([0, 1, 2], [3])


def a_warm_up_of_all_steps_is_to_blame(folder: Path) -> None:
    for steps, warmup, way_out in (
        (2, 1, r"raise retrain\.steps, or lower retrain\.warmup_steps 1$"),
        (1, 0, r"steps$"),
    ):
        with pytest.raises(Fruitless, match=f"the learning rate was 0 in all of them: .*{way_out}"):
            retrain(folder, f"{steps} steps", {}, steps=steps, warmup_steps=warmup)
    retrain(folder, "moved", {}, steps=2, warmup_steps=0)


def test_training_within_the_warm_up_says_so(models: Path) -> None:
    on_ranks(1, a_warm_up_of_all_steps_is_to_blame, models)


def test_hidden_states_are_kept_only_while_they_are_asked_for() -> None:
    blocks = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3))
    states = HiddenStates(blocks, [2, 0])
    inputs = torch.ones(1, 1, 2)
    with states.recording() as taken:
        outputs = [block(inputs) for block in blocks]
    assert len(taken) == 2
    assert taken[0] is outputs[2]
    assert taken[1] is outputs[0]
    blocks[0](inputs)  # as activation checkpointing does
    assert states._states is None
    assert math.isfinite(float(taken[0].detach().sum()))
