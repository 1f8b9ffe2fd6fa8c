"""Weights read slice by slice are those that transformers reads whole, and DeepSpeed works with them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import make_model
from ranks import on_ranks
from safetensors.torch import load_file, save_file

from mpruner_dist.cluster.engine import gathered, make_engine
from mpruner_dist.config import ModelConfig
from mpruner_dist.config.task import FACTS
from mpruner_dist.errors import UserError
from mpruner_dist.models.engines import load_for

SIZES: dict[str, Any] = {
    "vocab_size": 128, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64,
    "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2,
}  # fmt: skip
OF_TWO_STACKS = {
    "t5": transformers.T5Config(
        vocab_size=128, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    ),
    "marian": transformers.MarianConfig(**SIZES),
    "bart": transformers.BartConfig(bos_token_id=1, **SIZES),
}
FAMILIES = ["llama", "qwen3", "gemma2", "gpt2", "gpt_neox", "opt", "bloom", "mixtral"]
IDS = torch.arange(1, 25).view(2, 12)


def inference(dtype: str = "float32", **zero: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_optimization": {"stage": 3, **zero},
    }


def load(
    folder: Path, settings: dict[str, Any], dtype: str = "float32", head: bool = True, **model: Any
) -> tuple[Any, list[str]]:
    told: list[str] = []
    return load_for(settings, folder, ModelConfig(path=str(folder), dtype=dtype, **model), told.append, head=head), told


def expect_same(
    folder: Path, dtype: str = "float32", head: bool = True, task: Any = "causal-lm", **zero: Any
) -> list[str]:
    """Every parameter and buffer to the last bit, how it generates, and the output of a forward pass.

    Returns:
        What was logged.
    """
    kind = getattr(transformers, FACTS[task].auto_class) if head else transformers.AutoModel
    whole = kind.from_pretrained(folder, dtype=dtype).eval()
    settings = inference(dtype, **zero)
    model, told = load(folder, settings, dtype, head, task=task)
    inputs = {"input_ids": IDS} | ({"decoder_input_ids": IDS[:, :5]} if whole.config.is_encoder_decoder else {})
    expected = dict(whole.named_parameters())
    assert dict(model.named_parameters()).keys() == expected.keys()
    buffers = dict(whole.named_buffers())
    assert dict(model.named_buffers()).keys() == buffers.keys()
    for name, buffer in model.named_buffers():
        assert buffer.dtype == buffers[name].dtype, name
        assert torch.equal(buffer, buffers[name]), name
    for name, parameter in model.named_parameters():
        assert parameter.numel() == 0, "it lies whole on every rank"
        with gathered(parameter):
            assert parameter.dtype == expected[name].dtype, name
            assert torch.equal(parameter, expected[name]), name
    assert model.dtype == whole.dtype
    assert model.can_generate() == whole.can_generate()
    if whole.can_generate():
        assert model.generation_config.to_dict() == whole.generation_config.to_dict()
    assert model.config._attn_implementation == whole.config._attn_implementation
    engine = make_engine(model, settings)
    engine.eval()
    with torch.no_grad():
        got, wanted = engine(**inputs)[0], whole(**inputs)[0]
    assert torch.equal(got, wanted), (got - wanted).abs().max()
    return told


def every_family(folder: Path) -> None:
    for kind in FAMILIES:
        told = expect_same(folder / kind)
        if kind == "mixtral":
            assert "loaded by transformers, slowly" in told[0]
            assert "merges or splits" in told[0]
        else:
            assert told == [], kind
    assert expect_same(folder / "llama", head=False) == []
    assert expect_same(folder / "llama", "bfloat16") == []
    assert expect_same(folder / "halves", "float32") == []
    assert expect_same(folder / "tied") == []
    assert expect_same(folder / "gpt2", head=False) == []
    assert expect_same(folder / "llama", offload_param={"device": "cpu"}) == []


def of_two_stacks(folder: Path) -> None:
    for kind in OF_TWO_STACKS:
        for dtype in ("float32", "bfloat16"):
            assert expect_same(folder / kind, dtype, task="sequence-to-sequence") == [], (kind, dtype)
    for folder_of_bart in (folder / "bart", folder / "old"):
        model, _ = load(folder_of_bart, inference(), task="sequence-to-sequence")
        assert model.generation_config.num_beams == 3
        assert model.generation_config.max_length == 17
    assert expect_same(folder / "old", task="sequence-to-sequence") == []
    assert expect_same(folder / "marian", head=False, task="sequence-to-sequence") == []
    _, told = load(folder / "t5", inference("float16"), "float16", task="sequence-to-sequence")
    assert "in float16 it keeps modules such as wo in float32" in told[0]


def loss_of(engine: Any) -> float:
    with torch.no_grad():
        return float(engine(input_ids=IDS, labels=IDS).loss)


def one_family(folder: Path) -> None:
    assert expect_same(folder / "llama") == []
    assert expect_same(folder / "opt") == []


def on_nvme(folder: Path, swap: Path) -> None:
    """Partitions of at least a megabyte go to files, the others to CPU memory."""
    offload = {"device": "nvme", "nvme_path": str(swap), "buffer_count": 2, "buffer_size": 4_000_000}
    assert expect_same(folder / "wide", offload_param=offload) == []
    assert sum(file.stat().st_size for file in swap.rglob("*.swp")) >= 40_000 * 32 * 4 // 2


def train_three_steps(folder: Path, saved: Path) -> None:
    """The same steps on weights that were streamed and on those that transformers partitioned."""
    from mpruner_dist.models.loading import load_model

    settings = inference() | {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    }
    found = []
    for partition in (None, settings):
        if partition is None:
            model, told = load(folder / "tied", settings)
            assert told == []
        else:
            model = load_model(folder / "tied", "float32", partition=partition)
        model.train()
        engine = make_engine(model, settings, list(model.parameters()))
        for _ in range(3):
            loss = engine(input_ids=IDS, labels=IDS).loss
            engine.backward(loss)
            engine.step()
            found.append(loss.item())
        engine.save_checkpoint(str(saved), tag="saved")
        after_three = loss_of(engine)
        loss = engine(input_ids=IDS, labels=IDS).loss
        engine.backward(loss)
        engine.step()
        assert loss_of(engine) != after_three
        engine.load_checkpoint(str(saved), tag="saved")
        assert loss_of(engine) == after_three
    assert found[:3] == found[3:]
    assert found[2] < found[0]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny random models of several families."""
    folder = tmp_path_factory.mktemp("families")
    for kind in FAMILIES:
        sizes: dict[str, Any] = {"num_hidden_layers": 3}
        if kind == "opt":
            sizes |= {"word_embed_proj_dim": 32, "ffn_dim": 64}
        if kind in ("gemma2", "qwen3"):
            sizes["head_dim"] = 8
        if kind == "mixtral":
            sizes |= {"num_local_experts": 4}
        model = make_model(kind, folder / kind, **sizes)
        if kind == "llama":  # in several files
            (folder / kind / "model.safetensors").unlink()
            model.save_pretrained(folder / kind, max_shard_size="30KB")
            model.bfloat16().save_pretrained(folder / "halves")
    make_model("llama", folder / "tied", num_hidden_layers=3, tie_word_embeddings=True, vocab_size=131)
    make_model("llama", folder / "wide", num_hidden_layers=2, vocab_size=40_000)
    return folder


def test_two_ranks_hold_every_family_as_transformers_does(models: Path) -> None:
    on_ranks(2, every_family, models)


def test_encoder_decoders_are_held_and_generate_as_transformers_has_it(tmp_path: Path) -> None:
    """How it generates lies in a file of its own, or in the configuration, as in old folders."""
    for kind, config in OF_TWO_STACKS.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForSeq2SeqLM.from_config(config)
        if kind == "bart":
            model.generation_config.update(num_beams=3, max_length=17)
        model.save_pretrained(tmp_path / kind)
    shutil.copytree(tmp_path / "bart", tmp_path / "old")
    (tmp_path / "old" / "generation_config.json").unlink()
    stored = json.loads((tmp_path / "old" / "config.json").read_text()) | {"num_beams": 3, "max_length": 17}
    (tmp_path / "old" / "config.json").write_text(json.dumps(stored))
    on_ranks(2, of_two_stacks, tmp_path)


def test_three_ranks_and_sizes_that_do_not_divide(models: Path) -> None:
    on_ranks(3, one_family, models)


def test_streamed_weights_train_and_save_as_others_do(models: Path, tmp_path: Path) -> None:
    on_ranks(2, train_three_steps, models, tmp_path)


@pytest.mark.skipif(not Path("/usr/include/libaio.h").exists(), reason="needs the package libaio-dev")
def test_partitions_may_lie_on_nvme(models: Path, tmp_path: Path) -> None:
    on_ranks(2, on_nvme, models, tmp_path)


def refuse(folder: Path, message: str) -> None:
    with pytest.raises(UserError, match=f"does not fit its configuration: {message}"):
        load(folder, inference())


@pytest.mark.parametrize(("damage", "told"), [("missing", "is missing"), ("shape", "is .*must be")])
def test_a_tensor_that_is_missing_or_has_another_shape_is_named(
    models: Path, tmp_path: Path, damage: str, told: str
) -> None:
    tensors = load_file(models / "tied" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    if damage == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((models / "tied" / "config.json").read_bytes())
    on_ranks(1, refuse, tmp_path, name.replace(".", r"\.") + " " + told)
