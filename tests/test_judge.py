"""Losses of plans on workers are those of the model with the layers left out, however the work is divided."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
import transformers
from conftest import make_idle_layers, make_model, write_config
from ranks import on_ranks

from mpruner_dist.cluster.worker import Worker
from mpruner_dist.config import Config
from mpruner_dist.data.blocks import Blocks
from mpruner_dist.data.parts import save_part
from mpruner_dist.models.blocks import plain_blocks, skipped
from mpruner_dist.planning.judge import append_losses, judge_job, read_losses
from mpruner_dist.planning.losses import Losses

PLANS = [[], [3], [1, 2, 6], [5], list(range(1, 8))]
ROWS = (2, 9)


def probe(text: Callable[[], Losses]) -> dict[str, Any]:
    """Losses of some plans, batch by batch, asked for in two goes."""
    losses = text()
    losses.measure(PLANS[:2], [0, 2])
    return {"losses": losses.measure(PLANS, losses.batches).tolist(), "tokens": losses.tokens_B.tolist()}


def config_for(folder: Path) -> Config:
    text = {"path": "text.txt"}
    content = {"model": {"path": str(folder)}, "data": {"calibration": text, "test": text | {"path": "other.txt"}}}
    return Config.model_validate(content | {"evaluate": {"batch_size": 3}})


def on_this_rank(folder: Path, stages: list[int]) -> None:
    """The second rank does not see what an earlier attempt saved, as a network file system may have it."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for stage in stages:
        work = folder / (f"zero {stage}" if rank == 0 else "elsewhere")
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0}  # as small as they are, they are divided
        spec = {
            "config": config_for(folder), "model": folder, "blocks": folder / "validation.safetensors", "work": work,
            "deepspeed": {"zero_optimization": zero}, "texts": {"text": ROWS}, "task": probe, "passes": 5.0,
        }  # fmt: skip
        judge_job(Worker(rank, world, rank, world, "cpu", work, "plan"), spec)


def some_blocks(count: int) -> Blocks:
    draw = np.random.default_rng(0)
    return Blocks(draw.integers(3, 128, (count, 16)).astype(np.int32), draw.integers(8, 17, count).astype(np.int32))


def test_two_workers_measure_what_one_model_without_the_layers_does(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    blocks = some_blocks(ROWS[1] + 1)
    save_part(tmp_path / "validation.safetensors", blocks)
    for name in ("zero 0", "zero 3", "elsewhere"):
        (tmp_path / name).mkdir()
    torn = tmp_path / "zero 0" / "losses.jsonl"
    torn.write_text(f"\n{json.dumps([list(range(8)), [2, 9, 3], 1234.5])}\n[[0, 1, 2], [2, 9")
    on_ranks(2, on_this_rank, tmp_path, [0, 3])
    expected = []
    for dropped in PLANS:
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        kept = [layer for number, layer in enumerate(model.model.layers) if number not in dropped]
        model.model.layers = torch.nn.ModuleList(kept)
        model.config.num_hidden_layers = len(kept)
        expected.append([loss_of(model, blocks, range(first, ROWS[1], 3)) for first in range(2, 5)])
    for stage in (0, 3):
        got = json.loads((tmp_path / f"zero {stage}" / "result.json").read_text())
        assert got["tokens"] == [sum(int(blocks.lengths[row]) - 1 for row in range(first, 9, 3)) for first in (2, 3, 4)]
        losses = np.array(got["losses"])
        if stage == 0:
            assert losses[0, 0] == pytest.approx(1234.5 / got["tokens"][0])  # what an earlier attempt had saved
            losses[0, 0] = expected[0][0]
        np.testing.assert_allclose(losses, expected, rtol=2e-6)
        saved = read_losses(tmp_path / f"zero {stage}" / "losses.jsonl")
        assert len(saved) == len(PLANS) * 3


def loss_of(model: Any, blocks: Blocks, rows: range) -> float:
    nll = tokens = 0.0
    for row in rows:
        ids = torch.from_numpy(blocks.ids[row, : blocks.lengths[row]]).long()[None]
        with torch.no_grad():
            nll += float(model(input_ids=ids, labels=ids, use_cache=False).loss) * (ids.numel() - 1)
        tokens += ids.numel() - 1
    return nll / tokens


def test_a_torn_line_is_measured_again_and_harms_no_other(tmp_path: Path) -> None:
    file = tmp_path / "losses.jsonl"
    assert read_losses(file) == {}
    pairs = [((0, 1), (0, 4, 2)), ((0, 2), (1, 4, 2))]
    append_losses(file, pairs, [1.5, float("inf")])
    file.write_text(file.read_text()[:-3])
    assert read_losses(file) == {pairs[0]: 1.5}
    append_losses(file, pairs[1:], [2.5])
    assert read_losses(file) == {pairs[0]: 1.5, pairs[1]: 2.5}


@pytest.mark.parametrize(("kind", "computed"), [("llama", False), ("bloom", True)])
def test_a_block_that_is_skipped_is_not_computed_where_that_can_be(tmp_path: Path, kind: str, computed: bool) -> None:
    model = make_model(kind, tmp_path)
    blocks = model.model.layers if kind == "llama" else model.transformer.h
    ids = torch.arange(3, 15)[None]

    def forward() -> Any:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits

    whole = forward()
    plain = plain_blocks(blocks, forward)
    assert plain == (set() if computed else set(range(8)))
    with skipped(blocks, [2, 5]):
        expected = forward()
    ran: list[int] = []
    for layer in (2, 3):
        child = next(blocks[layer].children())
        child.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
    with skipped(blocks, [2, 5], plain):
        assert torch.equal(forward(), expected)
    assert ran == ([2, 3] if computed else [3])
    assert torch.equal(forward(), whole)  # all are back
    assert not torch.equal(expected, whole)


@pytest.mark.ray
def test_a_search_on_two_workers_is_begun_again_from_its_file_by_one(
    settings: dict[str, Any], mpruner: Any, tmp_path: Path, tiny: Path
) -> None:
    """Layers 3 and 5 do nothing, which the search must find out from losses."""
    make_idle_layers(tmp_path / "model", [3, 5], share=0.0)
    settings["model"]["path"] = str(tmp_path / "model")
    settings["plan"] = {"method": "search", "keep_layers": 5, "passes": 20, "judge_blocks": 12}
    settings["cluster"]["workers"] = 2
    config, run = write_config(tmp_path / "config.yaml", settings | {"retrain": None}), tmp_path / "run"
    code, output = mpruner("plan", config, "--run-dir", run)
    assert code == 0, output
    plan = json.loads((run / "plan.json").read_text())
    assert {3, 5} < set(plan["dropped"])
    assert plan["judged"]["passes"] <= 20
    assert all(abs(plan["reasons"][str(layer)]["cost"]) < 1e-6 for layer in (3, 5))
    assert "judged on" in output
    [file] = run.glob("plan/*/losses.jsonl")
    before = file.read_text()
    (run / "plan.json").unlink()
    code, output = mpruner("plan", config, "--run-dir", run, "--set", "cluster.workers=1")
    assert code == 0, output
    assert json.loads((run / "plan.json").read_text()) == plan
    assert file.read_text() == before  # nothing was measured again
