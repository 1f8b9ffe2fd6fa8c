"""Models of stages: one count of layers, plans that keep to their stage, running means that all workers share."""

import itertools
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import make_family
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import on_ranks
from safetensors.torch import load_file
from test_plans import random_cka, some_losses

from mpruner_dist.checkpoints.export import export_weights
from mpruner_dist.checkpoints.folder import read_checkpoint
from mpruner_dist.checkpoints.naming import layer_parameters
from mpruner_dist.cluster.engine import make_engine
from mpruner_dist.cluster.settings import inference_settings
from mpruner_dist.cluster.worker import Worker
from mpruner_dist.config import LoraConfig, PlanConfig, RetrainConfig
from mpruner_dist.data.model_folder import read_config
from mpruner_dist.errors import Fruitless, UserError
from mpruner_dist.models.blocks import normalisations
from mpruner_dist.models.loading import empty_model, load_model
from mpruner_dist.models.naming import layer_names
from mpruner_dist.models.stacks import run_blocks, run_stacks
from mpruner_dist.plan import Plan
from mpruner_dist.planning.clusters import open_decisions
from mpruner_dist.planning.planner import make_plan
from mpruner_dist.retraining.checkpoints import find_checkpoint, load_checkpoint, loading_settings, save_checkpoint
from mpruner_dist.retraining.job import require_change
from mpruner_dist.retraining.preparation import prepare_model, running_means, share_normalisations
from mpruner_dist.retraining.resume import prepare_resume
from mpruner_dist.retraining.targets import require_targets
from mpruner_dist.rewriting.rewrite import rewrite_checkpoint
from mpruner_dist.rewriting.shrink import Skeleton, pattern_of_places
from mpruner_dist.similarity.tap import summed_angles
from mpruner_dist.steps.retrain import retrain

STAGES = [3, 4, 5]
STARTS = {0, 3, 7}
METHODS = ["anchor", "chain", "complete", "partition", "influence", "last", "random", "greedy", "search"]


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=15)
@given(seed=st.integers(0, 1000), remove=st.integers(1, 6))
def test_the_first_layer_of_a_stage_stays_and_no_cluster_leaves_its_stage(method: str, seed: int, remove: int) -> None:
    config = PlanConfig(method=method, keep_layers=12 - remove, protect_last=0)
    cka = random_cka(seed, 12)
    influence = [0.1 + layer for layer in range(12)]
    plan = make_plan(cka, config, influence=influence, losses=some_losses(12, seed), stacks=STAGES)
    assert len(plan.dropped) == remove
    assert not STARTS & set(plan.dropped)
    for cluster in plan.clusters:
        assert len({sum(layer >= start for start in STARTS) for layer in cluster}) == 1


def test_a_threshold_lets_go_what_is_alike_within_a_stage() -> None:
    cka = [[1.0] * 12] * 12
    plan = make_plan(cka, PlanConfig(threshold=0.9, protect_last=0), stacks=STAGES)
    assert plan.clusters == [[0, 1, 2], [3, 4, 5, 6], [7, 8, 9, 10, 11]]
    assert plan.kept == sorted(STARTS)
    assert make_plan(cka, PlanConfig(threshold=0.9, protect_last=0)).kept == [0]
    with pytest.raises(UserError, match="keeping 2 layers would remove one of the protected"):
        make_plan(cka, PlanConfig(method="partition", keep_layers=2, protect_last=0), stacks=STAGES)


def test_no_threshold_lies_below_what_is_alike_within_a_stage() -> None:
    """Stages of 4, of which the first layer always stays, and with `keep: last` the last: only two can go of each."""
    cka = random_cka(0, 12)
    for remove in (6, 7, 8):
        config = PlanConfig(method="anchor", keep="last", keep_layers=12 - remove, protect_first=0, protect_last=0)
        if remove == 6:
            assert all(max(c) // 4 == min(c) // 4 for c in make_plan(cka, config, stacks=[4, 4, 4]).clusters)
        else:
            with pytest.raises(UserError, match=f"no threshold makes clusters that let {remove} of 12 layers go"):
                make_plan(cka, config, stacks=[4, 4, 4])


def test_only_comparisons_within_a_stage_are_open() -> None:
    cka = np.full((6, 6), 0.9)
    unsure = np.full((6, 6), np.inf)
    assert open_decisions(cka, unsure, 0.8, 2.0, {0, 3}) == [(0, 1), (0, 2), (3, 4), (3, 5)]
    assert open_decisions(cka, np.zeros((6, 6)), 0.8, 2.0, {0, 3}) == []


def test_the_layers_of_all_stages_are_counted_in_order(tmp_path: Path) -> None:
    model = make_family("resnet", tmp_path)
    names = layer_names(read_checkpoint(tmp_path).tensors, read_config(tmp_path))
    assert list(names) == [f"resnet.encoder.stages.{stage}.layers" for stage in range(4)]
    layers = list(itertools.chain.from_iterable(names.values()))
    blocks = run_blocks(model)
    assert len(layers) == len(blocks) == 11
    assert all(model.get_submodule(name) is block for name, block in zip(layers, blocks, strict=True))
    sizes = layer_parameters(read_checkpoint(tmp_path), layers)
    assert sizes == [sum(value.numel() for value in block.state_dict().values()) for block in blocks]


def test_a_plan_for_swin_keeps_the_pattern_of_its_windows(tmp_path: Path) -> None:
    """Every second block shifts its windows, by its number: other plans are refused when they are written."""
    model = make_family("swin", tmp_path / "model")
    stacks = [stack.depth for stack in run_stacks(model)]
    config = read_config(tmp_path / "model")
    whole = Skeleton(read_checkpoint(tmp_path / "model").config, config, empty_model(config))
    pattern = pattern_of_places(whole)
    assert pattern is not None
    depth = sum(stacks)
    for seed in range(6):
        asked = PlanConfig(method="partition", keep_layers=depth - 2, protect_first=0, protect_last=0)
        given: Any = {"stacks": stacks, "config": asked}
        plan = make_plan(random_cka(seed, depth), pattern=pattern, **given)
        assert len(plan.kept) == depth - 2
        rewrite_checkpoint(tmp_path / "model", tmp_path / f"small-{seed}", plan)
    broken = Plan.keeping(depth, [layer for layer in range(depth) if layer != 5])
    with pytest.raises(UserError, match=r"shift_size would be .*, was "):
        rewrite_checkpoint(tmp_path / "model", tmp_path / "refused", broken)
    for kind in ("vit", "llama", "gemma3_text"):  # a layer keeps its kind, wherever it goes
        make_family(kind, tmp_path / kind)
        config = read_config(tmp_path / kind)
        assert pattern_of_places(Skeleton(read_checkpoint(tmp_path / kind).config, config, empty_model(config))) is None


def test_angles_are_measured_between_states_of_equal_width_alone() -> None:
    draw = torch.Generator().manual_seed(0)
    states = [torch.randn(6, width, generator=draw) for width in (4, 4, 9, 9)]
    angles = summed_angles(states, torch.arange(len(states[0])))
    assert angles[0, 2] == angles[1, 3] == 6
    for one, other in ((0, 1), (2, 3)):
        cosine = torch.cosine_similarity(states[one].double(), states[other].double())
        assert angles[one, other] == pytest.approx(float(cosine.arccos().sum() / torch.pi), rel=1e-9)
    assert (angles.diagonal() == 0).all()


def small_resnet(folder: Path) -> None:
    sizes: dict[str, Any] = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [2, 2], "layer_type": "basic"}
    transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes)).save_pretrained(folder)


@pytest.mark.parametrize("changes", [{"layers": [1]}, {"lora": LoraConfig()}])
def test_part_of_a_model_with_batch_normalisation_is_not_trained(tmp_path: Path, changes: dict[str, Any]) -> None:
    small_resnet(tmp_path)
    model = load_model(tmp_path, "float32", kind="AutoModelForImageClassification")
    config = RetrainConfig(lora=changes.get("lora"))
    with pytest.raises(UserError, match="ResNetForImageClassification has batch normalisation"):
        prepare_model(model, read_checkpoint(tmp_path), config, changes.get("layers"))
    early = RetrainConfig(lora=config.lora, trainable="neighbours" if "layers" in changes else "all")
    with pytest.raises(UserError, match="ResNetForImageClassification has batch normalisation"):
        require_targets(early, read_config(tmp_path))
    require_targets(RetrainConfig(micro_batch_size=2), read_config(tmp_path))
    with pytest.raises(UserError, match=r"retrain\.micro_batch_size 1: the model has batch normalisation"):
        require_targets(RetrainConfig(), read_config(tmp_path))


def test_running_means_are_written_back_and_not_held_still(tmp_path: Path) -> None:
    small_resnet(tmp_path)
    model = load_model(tmp_path, "float32", kind="AutoModelForImageClassification")
    weights = prepare_model(model, read_checkpoint(tmp_path), RetrainConfig(), None)
    assert weights.keys() == read_checkpoint(tmp_path).tensors.keys()
    assert not any(weight.frozen for weight in weights.values())
    assert model.training


def share(folder: str) -> None:
    rank = torch.distributed.get_rank()
    worker = Worker(rank, 3, rank, 3, "cpu", Path(folder), "retrain")
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(2), torch.nn.Linear(2, 2))
    assert len(normalisations(model)) == 1
    with torch.no_grad():
        model[0].running_mean += rank
        model[1].weight.fill_(rank)
    share_normalisations(worker, model)
    assert model[0].running_mean.tolist() == [1.0, 1.0]  # type: ignore[operator, union-attr]
    assert model[1].weight.unique().tolist() == [rank]


def test_workers_share_running_means_and_nothing_else(tmp_path: Path) -> None:
    on_ranks(3, share, str(tmp_path))


def test_running_means_alone_are_no_training(tmp_path: Path) -> None:
    small_resnet(tmp_path / "pruned")
    model = load_model(tmp_path / "pruned", "float32", kind="AutoModelForImageClassification")
    pruned = read_checkpoint(tmp_path / "pruned")
    weights = prepare_model(model, pruned, RetrainConfig(), None)
    model(pixel_values=torch.rand(4, 3, 16, 16))
    counts = export_weights(weights, pruned, tmp_path / "out", lambda *_: nullcontext(), is_writer=True)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("pruned", "out"))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert counts.trained_tensors == len(list(model.parameters()))
    with pytest.raises(Fruitless, match=r"none of the .* trained tensors has changed"):
        require_change(counts, RetrainConfig(), [1e-3])


def test_a_micro_batch_counts_only_where_it_is_normalised(tmp_path: Path) -> None:
    """Other results lie in another folder: training with another size does not go on from them."""
    small_resnet(tmp_path / "resnet")
    make_family("llama", tmp_path / "llama")

    def inputs(kind: str, size: int) -> dict[str, Any]:
        section = RetrainConfig(micro_batch_size=size)
        config = SimpleNamespace(retrain=section, model=SimpleNamespace(dtype="float32"))
        road: Any = SimpleNamespace(
            config=config, plan=lambda: Plan.keeping(4, [0, 2, 3]), text=str, model_id=kind,
            checkpoint=read_checkpoint(tmp_path / kind), source=tmp_path / kind,
        )  # fmt: skip
        return retrain(road)[0]

    assert inputs("resnet", 1) != inputs("resnet", 2)
    assert inputs("llama", 1) == inputs("llama", 2)


def forward_in_bfloat16(folder: str) -> None:
    model = load_model(Path(folder), "bfloat16", kind="AutoModelForImageClassification")
    engine = make_engine(model, inference_settings({}, 0, "bfloat16"))
    logits = engine(pixel_values=torch.rand(2, 3, 16, 16)).logits
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()


def test_pixels_are_given_in_the_models_number_type(tmp_path: Path) -> None:
    small_resnet(tmp_path)
    on_ranks(1, forward_in_bfloat16, str(tmp_path))


RESUMED: dict[str, Any] = {
    "train_batch_size": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 10, "warmup_num_steps": 2}},
}


def save_or_resume(folder: Path, stage: int) -> None:
    """One step and a checkpoint; where there is one, its running means must come back."""
    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    worker = Worker(rank, ranks, rank, ranks, "cpu", folder, "test")
    run, settings = folder / "run", RESUMED | {"zero_optimization": {"stage": stage}}
    settings["train_micro_batch_size_per_gpu"] = 2 // ranks
    found = find_checkpoint(worker, run, settings)
    model = load_model(folder / "model", "float32", kind="AutoModelForImageClassification").train()
    engine = make_engine(model, loading_settings(found, settings), list(model.parameters()))
    if load_checkpoint(worker, engine, run, found):
        expected = torch.load(folder / "means.pt")
        assert (found is not None and found.universal, len(expected)) == (True, 3 * len(normalisations(engine.module)))
        for name, buffer in running_means(engine.module).items():
            assert torch.equal(buffer, expected[name]), name
        return
    pixels = torch.rand(2 // ranks, 3, 16, 16, generator=torch.Generator().manual_seed(rank))
    engine.backward(engine(pixel_values=pixels).logits.square().mean())
    engine.step()
    share_normalisations(worker, engine.module)
    save_checkpoint(worker, engine, run, 1, keep=1)
    if rank == 0:
        torch.save(running_means(engine.module), folder / "means.pt")


def test_running_means_come_back_whatever_the_number_of_workers_and_the_zero_stage(tmp_path: Path) -> None:
    small_resnet(tmp_path / "model")
    on_ranks(2, save_or_resume, tmp_path, 1)
    prepare_resume(tmp_path / "run", {"zero_optimization": {"stage": 3}}, 1)
    on_ranks(1, save_or_resume, tmp_path, 3)
