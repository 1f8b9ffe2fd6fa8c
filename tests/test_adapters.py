"""Adapters merged into the weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import peft
import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file

from mpruner_dist.checkpoints.export import export_weights
from mpruner_dist.checkpoints.folder import read_checkpoint
from mpruner_dist.config import RetrainConfig
from mpruner_dist.models.loading import load_model
from mpruner_dist.retraining.preparation import prepare_model, trainable


@contextmanager
def whole(*_: torch.nn.Parameter) -> Iterator[None]:
    yield


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_merging_is_that_of_peft(tmp_path: Path, kind: str) -> None:
    """Tensor by tensor beside peft's own; GPT-2's matrices are transposed."""
    make_model(kind, tmp_path / "model", num_hidden_layers=2)
    checkpoint = read_checkpoint(tmp_path / "model")
    model = load_model(tmp_path / "model", "float32")
    config = RetrainConfig.model_validate({"lora": {"rank": 2, "alpha": 5.0}})
    weights = prepare_model(model, checkpoint, config, None)
    trained = trainable(model)
    assert {parameter.shape[0] for parameter in trained if parameter.shape[0] == 2}
    assert len(trained) == 2 * sum(weight.added is not None for weight in weights.values())
    for parameter in trained:
        parameter.data.normal_(0, 0.1)
    export_weights(weights, checkpoint, tmp_path / "merged", whole, is_writer=True)
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.merge()
    merged = load_file(tmp_path / "merged/model.safetensors")
    for name, weight in weights.items():
        assert torch.equal(merged[name], weight.parameter), name
    head = model.get_output_embeddings()
    assert not isinstance(head, peft.tuners.lora.LoraLayer)
