"""Checkpoints that training left, of DeepSpeed and of FSDP: their weights and moments are those of the engine."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import make_model
from ranks import on_ranks
from test_sources import KEPT, expect_same, expected, weights_in

from mpruner_dist.checkpoints.formats import open_checkpoint
from mpruner_dist.cluster.engine import gathered
from mpruner_dist.errors import UserError
from mpruner_dist.rewriting.proof import verify_checkpoint
from mpruner_dist.rewriting.rewrite import rewrite_checkpoint
from mpruner_dist.rewriting.universal import rewrite_universal


def engine_for(source: Path, stage: int, freeze: bool, resume: bool) -> Any:
    import deepspeed

    kind = transformers.AutoModelForCausalLM
    model = (
        kind.from_config(transformers.AutoConfig.from_pretrained(source)) if resume else kind.from_pretrained(source)
    )
    model.model.embed_tokens.weight.requires_grad_(not freeze)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": True},
        "checkpoint": {"load_universal": resume},
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return deepspeed.initialize(model=model, model_parameters=trained, config=settings)[0]


def step(engine: Any) -> float:
    ids = torch.arange(3, 23).view(1, 20) + torch.distributed.get_rank()
    loss = engine(input_ids=ids, labels=ids).loss
    engine.backward(loss)
    engine.step()
    return float(loss)


def save_state(engine: Any, path: Path) -> None:
    """Weights and moments by name, whole."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    state: dict[str, dict[str, Any]] = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            with gathered(parameter):
                state[name] = {"fp32": parameter.detach().clone()}
            continue
        state[name] = {key: safe_get_full_optimizer_state(parameter, key) for key in ("exp_avg", "exp_avg_sq")}
        state[name]["fp32"] = safe_get_full_fp32_param(parameter)
    if torch.distributed.get_rank() == 0:
        torch.save({"state": state, "steps": engine.global_steps}, path)


def train(folder: Path, stage: int, freeze: bool) -> None:
    engine = engine_for(folder / "model", stage, freeze, resume=False)
    for _ in range(2):
        step(engine)
    engine.save_checkpoint(folder / "saved")
    save_state(engine, folder / "before.pt")


def go_on(folder: Path, stage: int) -> None:
    engine = engine_for(folder / "universal", stage, freeze=False, resume=True)
    engine.load_checkpoint(folder / "universal")
    save_state(engine, folder / "after.pt")
    assert 0 < step(engine) < 100
    assert engine.global_steps == 3


@pytest.mark.parametrize(
    ("stage", "ranks", "other_ranks", "freeze"),
    [(1, 2, 1, False), (1, 2, 1, True), (2, 2, 1, False), (3, 2, 1, False), (3, 3, 3, True)],
)
def test_a_deepspeed_checkpoint(tmp_path: Path, stage: int, ranks: int, other_ranks: int, freeze: bool) -> None:
    """Its weights to safetensors; its weights and moments to a universal checkpoint, from which training goes on."""
    make_model("llama", tmp_path / "model", intermediate_size=57)  # does not divide evenly
    on_ranks(ranks, train, tmp_path, stage, freeze)
    before = torch.load(tmp_path / "before.pt")["state"]
    source = tmp_path / "saved"
    with pytest.raises(UserError, match=r"holds no config\.json: say where it lies with --config"):
        rewrite_checkpoint(source, tmp_path / "small", KEPT)
    rewrite_checkpoint(source, tmp_path / "small", KEPT, config_folder=tmp_path / "model", max_shard_bytes=60_000)
    asked = {name: of["fp32"] if stage == 3 else of["fp32"].bfloat16() for name, of in expected(before).items()}
    expect_same(weights_in(tmp_path / "small"), asked)
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 1
    verify_checkpoint(tmp_path / "small")

    if freeze:
        with pytest.raises(UserError, match=r"has 1 parameters that are not trained, such as model\.embed_tokens"):
            rewrite_universal(source, tmp_path / "universal", KEPT, config_folder=tmp_path / "model")
        return
    rewrite_universal(source, tmp_path / "universal", KEPT, config_folder=tmp_path / "model")
    assert json.loads((tmp_path / "universal" / "layer_map.json").read_text())["new_to_old"] == KEPT
    assert not (tmp_path / "universal" / "latest").exists()
    on_ranks(other_ranks, go_on, tmp_path, stage)
    after = torch.load(tmp_path / "after.pt")
    assert after["steps"] == 2
    assert after["state"].keys() == expected(before).keys()
    for name, of in expected(before).items():
        for key, value in of.items():
            assert torch.equal(after["state"][name][key], value), (name, key)
            assert value.abs().max() > 0, (name, key)

    (source / "global_step2" / next(source.glob("*/*_pp_rank_1_*_optim_states.pt")).name).unlink()
    if stage == 3:
        with pytest.raises(UserError, match=f"{ranks} files of model states and {ranks - 1}"):
            open_checkpoint(source, tmp_path / "model")
    else:
        with pytest.raises(UserError, match=f"was written by {ranks} ranks and has optimizer states of {ranks - 1}"):
            rewrite_universal(source, tmp_path / "other", KEPT, config_folder=tmp_path / "model")


def test_parts_of_experts_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "global_step2"
    folder.mkdir()
    (folder / "layer_0_expert_3_mp_rank_00_model_states.pt").touch()
    (tmp_path / "latest").write_text(folder.name)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"tensor, pipeline or expert parallelism \(layer_0_expert_3_mp_rank_00"):
        open_checkpoint(tmp_path, tmp_path)


def test_only_deepspeed_checkpoints_have_moments(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no DeepSpeed checkpoint"):
        rewrite_universal(tiny / "model", tmp_path / "small", [0, 7])


def save_distributed(folder: Path, wrapped: bool) -> None:
    """Shard with FSDP2 and save as torch does, with an optimizer beside the model."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.fsdp import fully_shard

    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.arange(3, 23).view(1, 20)).logits.sum().backward()
    optimizer.step()
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments} if wrapped else weights, checkpoint_id=folder / "dcp")
    whole = {name: getattr(tensor, "full_tensor", lambda t=tensor: t)() for name, tensor in weights.items()}
    if torch.distributed.get_rank() == 0:
        torch.save(whole, folder / "whole.pt")


@pytest.mark.parametrize(("ranks", "wrapped"), [(1, False), (3, True)])
def test_a_distributed_checkpoint(tmp_path: Path, ranks: int, wrapped: bool) -> None:
    make_model("llama", tmp_path / "model", intermediate_size=57)
    on_ranks(ranks, save_distributed, tmp_path, wrapped)
    rewrite_checkpoint(tmp_path / "dcp", tmp_path / "small", KEPT, config_folder=tmp_path / "model")
    expect_same(weights_in(tmp_path / "small"), expected(torch.load(tmp_path / "whole.pt")))
    verify_checkpoint(tmp_path / "small")
    next((tmp_path / "dcp").glob("*.distcp")).unlink()
    with pytest.raises(UserError, match=r"\.metadata names '__0_0\.distcp', which is no file beside it"):
        open_checkpoint(tmp_path / "dcp", tmp_path / "model")
