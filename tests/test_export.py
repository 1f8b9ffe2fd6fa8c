"""The weights of a live model, written over a copy of its folder: the same names, dtypes and files."""

import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mpruner_dist.checkpoints.export import NOT_ASKED_FOR, Weight, export_weights, match_names
from mpruner_dist.checkpoints.folder import INDEX_NAME, CheckpointFolder, index_json, read_checkpoint, shard_name
from mpruner_dist.checkpoints.header import read_header
from mpruner_dist.errors import StageFailure


class Tiny(torch.nn.Module):
    """A model with tied weights, a scalar and two dtypes in its files."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = torch.nn.Module()
        self.model.embed = torch.nn.Embedding(7, 4)
        self.model.norm = torch.nn.Parameter(torch.randn(()))
        self.head = torch.nn.Linear(4, 7, bias=True)


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[Tiny, CheckpointFolder]:
    folder = tmp_path / "model"
    folder.mkdir()
    model = Tiny()
    shards = {
        shard_name(1, 2): {"embed.weight": model.model.embed.weight.data.bfloat16(), "norm": model.model.norm.data},
        shard_name(2, 2): {"head.weight": model.head.weight.data, "head.bias": model.head.bias.data.half()},
    }
    for name, tensors in shards.items():
        save_file(tensors, folder / name, {"format": "pt"})
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("words")
    (folder / INDEX_NAME).write_text(json.dumps(index_json({name: read_header(folder / name) for name in shards})))
    return model, read_checkpoint(folder)


def whole(*_: torch.nn.Parameter) -> AbstractContextManager[None]:
    return nullcontext()


def trained(model: Tiny, checkpoint: CheckpointFolder) -> dict[str, Weight]:
    return {name: Weight(parameter) for name, parameter in match_names(model, checkpoint, "model").items()}


def stored(checkpoint: CheckpointFolder, folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for shard in checkpoint.shards for name, tensor in load_file(folder / shard).items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_unchanged_weights_make_the_same_folder_byte_for_byte(
    tiny: tuple[Tiny, CheckpointFolder], tmp_path: Path
) -> None:
    model, checkpoint = tiny
    parameters = match_names(model, checkpoint, "model")
    assert parameters["embed.weight"] is model.model.embed.weight
    assert parameters["head.bias"] is model.head.bias
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model-00001-of-00030.safetensors").write_bytes(b"of an export that was stopped")
    counts = export_weights(trained(model, checkpoint), checkpoint, tmp_path / "out", whole, is_writer=True)
    assert (counts.trained_tensors, counts.changed_tensors, counts.frozen_tensors) == (len(parameters), 0, 0)
    assert contents(tmp_path / "out") == contents(checkpoint.path)


def test_new_values_are_written_in_the_dtype_of_the_files(tiny: tuple[Tiny, CheckpointFolder], tmp_path: Path) -> None:
    model, checkpoint = tiny
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.123)
        model.head.weight.data = model.head.weight.data.T.contiguous().T  # as it may lie in memory
    export_weights(trained(model, checkpoint), checkpoint, tmp_path / "out", whole, is_writer=True)
    found = {n: t for shard in checkpoint.shards for n, t in load_file(tmp_path / "out" / shard).items()}
    assert torch.equal(found["embed.weight"], model.model.embed.weight.data.bfloat16())
    assert torch.equal(found["norm"], model.model.norm.data)
    assert torch.equal(found["head.weight"], model.head.weight.data)
    assert torch.equal(found["head.bias"], model.head.bias.data.half())
    assert read_checkpoint(tmp_path / "out").tensors == checkpoint.tensors


def test_what_a_narrower_number_type_rounds_is_no_change(tiny: tuple[Tiny, CheckpointFolder], tmp_path: Path) -> None:
    model, checkpoint = tiny
    files = stored(checkpoint, checkpoint.path)
    for name, parameter in match_names(model, checkpoint, "model").items():
        parameter.data = files[name].bfloat16()
    counts = export_weights(trained(model, checkpoint), checkpoint, tmp_path / "out", whole, is_writer=True)
    assert counts.changed_tensors == 0
    assert contents(tmp_path / "out") != contents(checkpoint.path)
    model.head.weight.data[0, 0] += 1
    counts = export_weights(trained(model, checkpoint), checkpoint, tmp_path / "again", whole, is_writer=True)
    assert counts.changed_tensors == 1


def test_others_gather_every_weight_and_write_nothing(tiny: tuple[Tiny, CheckpointFolder], tmp_path: Path) -> None:
    model, checkpoint = tiny
    gathered: list[torch.nn.Parameter] = []

    def gather(*parameters: torch.nn.Parameter) -> AbstractContextManager[None]:
        gathered.extend(parameters)
        return nullcontext()

    parameters = match_names(model, checkpoint, "model")
    export_weights(trained(model, checkpoint), checkpoint, tmp_path / "out", gather, is_writer=False)
    assert [id(parameter) for parameter in gathered] == [id(parameters[name]) for name in checkpoint.tensors]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_values_that_are_not_finite_in_the_file_are_refused_by_name(
    tiny: tuple[Tiny, CheckpointFolder], tmp_path: Path, value: float
) -> None:
    model, checkpoint = tiny
    model.head.bias.data[2] = value  # 1e30 is finite in memory, and infinite in the float16 of the file
    with pytest.raises(StageFailure, match=r"head\.bias is not finite after retraining"):
        export_weights(trained(model, checkpoint), checkpoint, tmp_path / "out", whole, is_writer=True)


def test_a_shape_of_another_model_is_refused_by_name(tiny: tuple[Tiny, CheckpointFolder], tmp_path: Path) -> None:
    model, checkpoint = tiny
    model.head.weight = torch.nn.Parameter(torch.zeros(4, 7))
    with pytest.raises(StageFailure, match=r"head\.weight has shape \[4, 7\] in memory and \[7, 4\] in .*safetensors"):
        export_weights(trained(model, checkpoint), checkpoint, tmp_path / "out", whole, is_writer=True)


def test_a_tensor_that_is_no_parameter_is_refused_by_name(tiny: tuple[Tiny, CheckpointFolder]) -> None:
    model, checkpoint = tiny
    del model.model.norm
    with pytest.raises(StageFailure, match=r"model: tensor norm \(F32\) is no parameter of the model in memory"):
        match_names(model, checkpoint, "model")


def test_a_parameter_that_no_tensor_is_for_is_refused_by_name(tiny: tuple[Tiny, CheckpointFolder]) -> None:
    """However the tensors are explained away: what is trained must be written."""
    model, checkpoint = tiny
    with pytest.raises(StageFailure, match=r"model: no tensor is the model's parameter model\.norm, so that its"):
        match_names(model, checkpoint, "model", unasked=["norm"])
    model.model.norm.requires_grad_(False)
    assert match_names(model, checkpoint, "model", unasked=["norm"]).keys() == checkpoint.tensors.keys() - {"norm"}


def test_what_the_model_does_not_ask_for_stays_whatever_its_number_type(
    tiny: tuple[Tiny, CheckpointFolder], tmp_path: Path
) -> None:
    model, checkpoint = tiny
    shard = next(iter(checkpoint.shards))
    more = {"old.scale": torch.randn(3, 5).to(torch.float8_e4m3fn), "old.empty": torch.empty(0)}
    save_file(load_file(checkpoint.path / shard) | more, checkpoint.path / shard, {"format": "pt"})
    files = {name: read_header(checkpoint.path / name) for name in checkpoint.shards}
    (checkpoint.path / INDEX_NAME).write_text(json.dumps(index_json(files)))
    checkpoint = read_checkpoint(checkpoint.path)
    with pytest.raises(StageFailure, match=r"model: tensor old\.\w+ \(F\w+\) is no parameter of the model in memory"):
        match_names(model, checkpoint, "model")
    parameters = match_names(model, checkpoint, "model", unasked=more)
    weights = {name: Weight(parameter) for name, parameter in parameters.items()} | dict.fromkeys(more, NOT_ASKED_FOR)
    counts = export_weights(weights, checkpoint, tmp_path / "out", whole, is_writer=True)
    assert contents(tmp_path / "out") == contents(checkpoint.path)
    assert (counts.frozen_tensors, counts.frozen_parameters, counts.proved_tensors) == (2, 15, 0)


def test_a_weight_that_was_not_gathered_is_refused_by_name(tiny: tuple[Tiny, CheckpointFolder], tmp_path: Path) -> None:
    model, checkpoint = tiny
    model.head.weight.data = torch.zeros(0)  # what ZeRO-3 leaves
    with pytest.raises(StageFailure, match=r"head\.weight has shape \[0\] in memory"):
        export_weights(trained(model, checkpoint), checkpoint, tmp_path / "out", whole, is_writer=True)


def test_frozen_weights_keep_the_bytes_of_the_file_whatever_the_number_type_in_memory(
    tiny: tuple[Tiny, CheckpointFolder], tmp_path: Path
) -> None:
    model, checkpoint = tiny
    for name, value in stored(checkpoint, checkpoint.path).items():
        match_names(model, checkpoint, "model")[name].data = value.half()  # the file has more digits
    weights = {name: Weight(weight.parameter, frozen=True) for name, weight in trained(model, checkpoint).items()}
    weights["norm"] = Weight(model.model.norm)
    model.model.norm.data += 1
    counts = export_weights(weights, checkpoint, tmp_path / "out", whole, is_writer=True)
    before, after = (stored(checkpoint, folder) for folder in (checkpoint.path, tmp_path / "out"))
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["norm"]
    frozen = len(before) - 1
    assert (counts.trained_tensors, counts.changed_tensors) == (1, 1)
    assert (counts.frozen_tensors, counts.proved_tensors) == (frozen, frozen)
    assert counts.trained_parameters + counts.frozen_parameters == checkpoint.num_parameters
    model.head.bias.data[1] += 0.01
    with pytest.raises(StageFailure, match=r"head\.bias was to stay frozen and is not what it is in .*safetensors"):
        export_weights(weights, checkpoint, tmp_path / "again", whole, is_writer=True)


def test_what_adapters_add_is_added_to_the_value_in_the_file(
    tiny: tuple[Tiny, CheckpointFolder], tmp_path: Path
) -> None:
    model, checkpoint = tiny
    for name, value in stored(checkpoint, checkpoint.path).items():
        match_names(model, checkpoint, "model")[name].data = value.bfloat16()
    weights = trained(model, checkpoint)
    base, asked = model.head.weight, []

    def gather(*parameters: torch.nn.Parameter) -> AbstractContextManager[None]:
        asked.append(parameters)
        return nullcontext()

    weights["head.weight"] = Weight(base, True, (model.head.bias,), lambda: torch.full_like(base, 0.5))
    counts = export_weights(weights, checkpoint, tmp_path / "out", gather, is_writer=True)
    before, after = (stored(checkpoint, folder) for folder in (checkpoint.path, tmp_path / "out"))
    assert torch.equal(after["head.weight"], before["head.weight"] + 0.5)
    assert (base, model.head.bias) in [tuple(parameters) for parameters in asked if len(parameters) == 2]
    assert (counts.proved_tensors, counts.frozen_tensors) == (1, 0)
