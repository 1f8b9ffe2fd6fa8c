"""Checkpoints of every kind: the bytes found in them are the weights that torch or DeepSpeed would load."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import make_model
from families import make_family
from safetensors.torch import load_file

from mpruner_dist.checkpoints.formats import open_checkpoint
from mpruner_dist.checkpoints.source import resolve_source
from mpruner_dist.checkpoints.torch_files import read_torch_file
from mpruner_dist.errors import UserError
from mpruner_dist.models.loading import empty_model
from mpruner_dist.models.stacks import find_stacks
from mpruner_dist.rewriting.proof import verify_checkpoint
from mpruner_dist.rewriting.rewrite import rewrite_checkpoint
from mpruner_dist.rewriting.shrink import Skeleton, shrink

KEPT = [0, 3, 6, 7]


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}


def expected(weights: dict[str, torch.Tensor], kept: list[int] = KEPT) -> dict[str, torch.Tensor]:
    """Named anew by hand."""
    found = {}
    for name, tensor in weights.items():
        parts = name.split(".")
        if parts[1] == "layers":
            if int(parts[2]) not in kept:
                continue
            parts[2] = str(kept.index(int(parts[2])))
        found[".".join(parts)] = tensor
    return found


def expect_same(found: dict[str, torch.Tensor], asked: dict[str, torch.Tensor]) -> None:
    assert found.keys() == asked.keys()
    for name, tensor in asked.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def save_bin(model: Any, folder: Path, files: int) -> None:
    """As transformers wrote checkpoints before safetensors, a tied weight under both names."""
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    state = model.state_dict()
    names = list(state)
    if files == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    shards = {f"pytorch_model-{n + 1:05d}-of-{files:05d}.bin": names[n::files] for n in range(files)}
    for file, part in shards.items():
        torch.save({name: state[name] for name in part}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_files_of_torch_save(tmp_path: Path, files: int, tied: bool, dtype: torch.dtype) -> None:
    model = make_model("llama", tmp_path / "model", tie_word_embeddings=tied).to(dtype)
    shutil.rmtree(tmp_path / "model")
    save_bin(model, tmp_path / "model", files)
    rewrite_checkpoint(tmp_path / "model", tmp_path / "small", KEPT)
    asked = {n: t for n, t in model.state_dict().items() if not (tied and files == 1 and n == "lm_head.weight")}
    expect_same(weights_in(tmp_path / "small"), expected(asked))
    verify_checkpoint(tmp_path / "small")
    small = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert small.config.num_hidden_layers == 4


class Runs:
    """What an attacker would put into a file: unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2), "trap": Runs(tmp_path / "trap")}, tmp_path / "file.bin")
    content = read_torch_file(tmp_path / "file.bin")
    assert content["weight"].shape == (2,)
    assert not (tmp_path / "trap").exists()


def test_a_view_with_strides_is_refused_by_name(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "model")
    save_bin(model, tmp_path / "model", 1)
    state = model.state_dict()
    torch.save(state | {"model.norm.weight": torch.ones(64)[::2]}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"model\.norm\.weight is a view of another tensor \(strides \[2\]"):
        rewrite_checkpoint(tmp_path / "model", tmp_path / "small", KEPT)


def test_old_and_damaged_files_are_refused(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "model")
    save_bin(model, tmp_path / "model", 1)
    path = tmp_path / "model" / "pytorch_model.bin"
    content = path.read_bytes()
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"saved by torch before 1\.6"):
        open_checkpoint(tmp_path / "model")
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"pytorch_model\.bin is damaged"):
        open_checkpoint(tmp_path / "model")
    path.unlink()
    with pytest.raises(UserError, match=r"holds no weights that can be read: neither model\.safetensors"):
        open_checkpoint(tmp_path / "model")


def test_an_index_that_names_what_its_files_lack(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "model")
    save_bin(model, tmp_path / "model", 2)
    index = tmp_path / "model" / "pytorch_model.bin.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.ghost"] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"names tensors that its files lack: \[\('model\.ghost'"):
        open_checkpoint(tmp_path / "model")
    content["weight_map"]["model.ghost"] = "../elsewhere.bin"
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"'\.\./elsewhere\.bin', which is not a file of its own folder"):
        open_checkpoint(tmp_path / "model")


def test_a_folder_of_its_own_needs_no_other_configuration(tiny: Path) -> None:
    with pytest.raises(UserError, match="--config is for weights without"):
        open_checkpoint(tiny / "model", tiny / "model")


def test_mixtures_from_files_of_torch_save(tmp_path: Path) -> None:
    """Their experts lie merged in memory: the names are those of the model, which transformers loads as well."""
    model = make_family("mixtral", tmp_path / "model")
    save_bin(model, tmp_path / "model", 1)
    rewrite_checkpoint(tmp_path / "model", tmp_path / "small", KEPT)
    expect_same(weights_in(tmp_path / "small"), expected(model.state_dict()))


def test_a_hub_id_fetches_the_older_form_only_if_need_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[list[str]] = []

    def fetch(_: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert resolve_source("owner/name", None) == tmp_path
    assert ["*.safetensors" in asked[0], "pytorch_model*.bin" in asked[0]] == [True, False]
    assert "pytorch_model*.bin" in asked[1]
    (tmp_path / "model.safetensors").touch()
    resolve_source("owner/name", "main")
    assert len(asked) == 3


def test_a_model_far_larger_than_the_memory_is_laid_out(tmp_path: Path) -> None:
    """One parameter of 275 GB: the skeletons take no memory."""
    config = transformers.MixtralConfig(
        hidden_size=8192, intermediate_size=32768, num_local_experts=128, num_hidden_layers=40, vocab_size=128
    )
    config.architectures = ["MixtralForCausalLM"]
    model = empty_model(config)
    assert sum(parameter.numel() for parameter in model.parameters()) > 4e12
    whole = Skeleton(json.loads(config.to_json_string()), config, model)
    [stack] = find_stacks(model)
    small = shrink(whole, {stack: list(range(0, 40, 3))})
    assert small.stored["num_hidden_layers"] == 14
