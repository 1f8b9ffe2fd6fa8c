"""Vision families beside ViT and ResNet: what the stages of a run do with their blocks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from collecting import collect_on_this_rank, collected
from families import make_family
from ranks import on_ranks

from mpruner_dist.checkpoints.folder import read_checkpoint
from mpruner_dist.checkpoints.naming import layer_parameters
from mpruner_dist.config import Config, PlanConfig
from mpruner_dist.data.images import LabelledImages
from mpruner_dist.data.model_folder import read_config
from mpruner_dist.data.parts import save_part
from mpruner_dist.models.blocks import skipped
from mpruner_dist.models.loading import empty_model, load_model
from mpruner_dist.models.naming import layer_names
from mpruner_dist.models.stacks import run_blocks, run_stacks
from mpruner_dist.plan import Plan
from mpruner_dist.planning.planner import make_plan
from mpruner_dist.rewriting.rewrite import rewrite_checkpoint
from mpruner_dist.rewriting.shrink import Skeleton, pattern_of_places
from mpruner_dist.similarity.sums import BatchSums

KIND = "AutoModelForImageClassification"


def config_for(folder: Path) -> Config:
    return Config.model_validate({
        "model": {"path": str(folder / "model"), "task": "image-classification"},
        "data": {part: {"path": part} for part in ("calibration", "test")},
        "collect": {"unit": "image", "batch_size": 8, "num_batches": 3, "samples": 8, "outlier_norm": None},
    })  # fmt: skip


def collect_twice(folder: Path) -> None:
    """The second time as after a stop that came when more was saved than was looked at."""
    window = {"until": "settled", "check_every": 1}
    config = config_for(folder)
    config = config.model_copy(update={"collect": config.collect.model_copy(update=window)})
    for attempt in ("first", "second"):
        looked: list[int] = []

        def is_settled(sums: BatchSums, looked: list[int] = looked) -> bool:
            looked.append(len(sums))
            return len(sums) == 3

        collect_on_this_rank(folder, config, folder / "images.safetensors", is_settled)
        (folder / f"{attempt}.json").write_text(json.dumps(looked))


def test_it_looks_at_the_same_batches_again_after_a_stop(tmp_path: Path) -> None:
    make_family("swin", tmp_path / "model")
    pixels = np.random.default_rng(0).integers(0, 256, (24, 3, 64, 64)).astype(np.uint8)
    half = np.full(3, 0.5, np.float32)
    save_part(tmp_path / "images.safetensors", LabelledImages(pixels, np.zeros(24, np.int32), half, half))
    on_ranks(1, collect_twice, tmp_path)
    looked = [json.loads((tmp_path / f"{attempt}.json").read_text()) for attempt in ("first", "second")]
    assert looked == [[1, 2, 3], [1, 2, 3]]


@pytest.mark.parametrize(("family", "size", "channels"), [("swin", 64, 3), ("convnext", 64, 3)])
def test_a_family_of_stages_is_measured_planned_and_rewritten(
    family: str, size: int, channels: int, tmp_path: Path
) -> None:
    model: Any = make_family(family, tmp_path / "model")
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (24, channels, size, size)).astype(np.uint8)
    half = np.full(channels, 0.5, np.float32)
    save_part(tmp_path / "images.safetensors", LabelledImages(pixels, np.zeros(24, np.int32), half, half))
    stacks = [stack.depth for stack in run_stacks(model)]
    names = [f"block {layer}" for layer in range(sum(stacks))]
    found = collected(tmp_path / "sums", 1, config_for(tmp_path), tmp_path / "images.safetensors", names)
    assert found["num_samples"] == 24
    assert np.isfinite(np.array(found["cka"], float)).all()  # of different widths, on the same images
    config = read_config(tmp_path / "model")
    whole = Skeleton(read_checkpoint(tmp_path / "model").config, config, empty_model(config))
    asked = PlanConfig(method="partition", keep_layers=sum(stacks) - 3, protect_first=0, protect_last=0)
    plan = make_plan(found["cka"], asked, stacks=stacks, pattern=pattern_of_places(whole))
    assert len(plan.dropped) == 3
    rewrite_checkpoint(tmp_path / "model", tmp_path / "small", plan)
    small, original = (load_model(tmp_path / name, "float32", kind=KIND) for name in ("small", "model"))
    images = torch.from_numpy(pixels[:2]).float() / 255
    with torch.no_grad(), skipped(run_blocks(original), plan.dropped):
        expected = original(pixel_values=images).logits
    with torch.no_grad():
        torch.testing.assert_close(small(pixel_values=images).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "first"), [("resnet", 2), ("swin", 2), ("convnext", 2)])
def test_a_first_stage_of_one_block_is_not_taken_for_all_stages(family: str, first: int, tmp_path: Path) -> None:
    """As an earlier round leaves it: every tensor of the stage has the stage's number and the block's, both 0."""
    model: Any = make_family(family, tmp_path / "model")
    stacks = [stack.depth for stack in run_stacks(model)]
    assert stacks[0] == first
    kept = [0, *range(first, sum(stacks))]
    rewrite_checkpoint(tmp_path / "model", tmp_path / "once", Plan.keeping(sum(stacks), kept))
    checkpoint = read_checkpoint(tmp_path / "once")
    names = [name for of in layer_names(checkpoint.tensors, read_config(tmp_path / "once")).values() for name in of]
    assert len(set(names)) == len(names) == sum(stacks) - first + 1
    sizes = layer_parameters(checkpoint, names)
    blocks = run_blocks(load_model(tmp_path / "once", "float32", kind=KIND))
    assert sizes == [sum(tensor.numel() for tensor in block.state_dict().values()) for block in blocks]
    rewrite_checkpoint(tmp_path / "once", tmp_path / "twice", Plan.keeping(len(names), list(range(len(names) - 1))))
    assert read_config(tmp_path / "twice").depths == [1, *stacks[1:-1], stacks[-1] - 1]
