"""Configurations: what goes with the layers, and what no JSON can say."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import make_family
from test_families import edit_config, load

from mpruner_dist.errors import UserError
from mpruner_dist.models.blocks import skipped
from mpruner_dist.models.config_fields import moved_state, shrink_fields
from mpruner_dist.models.stacks import DepthField, find_stacks
from mpruner_dist.rewriting.rewrite import rewrite_checkpoint


def test_states_that_are_handed_on_stay_at_their_place() -> None:
    kept = [0, 2, 3, 5]  # of six: state 3 is between the third and the fourth
    assert [moved_state(state, 6, kept) for state in (0, 1, 2, 3, 6)] == [0, 1, 1, 2, 4]
    assert [moved_state(state, 6, kept) for state in (-1, -2, -3)] == [-1, -2, -2]
    assert moved_state(-2, 6, [0, 1, 2, 3]) == -1  # without the last layers
    fields = {"intermediate_layers_indices": [1, 3], "fullatt_block_indexes": [1, 3, 5], "depth": 6}
    small = shrink_fields(fields, 6, DepthField("depth"), kept)
    assert small == {"intermediate_layers_indices": [1, 2], "fullatt_block_indexes": [2, 3], "depth": 4}


def test_the_language_model_is_given_the_same_state_of_a_shorter_vision_tower(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    vision = transformers.CLIPVisionConfig(image_size=16, patch_size=8, num_hidden_layers=6, **sizes)
    text = transformers.LlamaConfig(vocab_size=128, num_hidden_layers=3, num_key_value_heads=2, **sizes)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=127)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "model")
    (stack,) = [stack for stack in find_stacks(model) if "vision" in stack.name]
    rewrite_checkpoint(tmp_path / "model", tmp_path / "small", {stack.name: [0, 2, 3]})
    assert json.loads((tmp_path / "small" / "config.json").read_text())["vision_feature_layer"] == -1
    small = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "small").eval()
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), skipped(model.get_submodule(stack.name), [1, 4, 5]):
        expected = model.get_image_features(pixel_values=pixels).pooler_output[0]
    with torch.no_grad():
        found = small.get_image_features(pixel_values=pixels).pooler_output[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("limit", [[0.0, float("inf")], [0.0, {"__float__": "Infinity"}]])
def test_infinite_numbers_of_a_configuration_are_read_and_written(tmp_path: Path, limit: list[Any]) -> None:
    sizes = {"hidden_size": 32, "num_heads": 4, "head_dim": 16, "state_size": 8, "num_hidden_layers": 4, "n_groups": 1}
    config = transformers.Mamba2Config(vocab_size=64, **sizes)
    transformers.Mamba2ForCausalLM(config).save_pretrained(tmp_path / "model")
    edit_config(tmp_path / "model", time_step_limit=limit)
    rewrite_checkpoint(tmp_path / "model", tmp_path / "small", [0, 2, 3])
    stored = json.loads((tmp_path / "small" / "config.json").read_text())
    assert stored["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    assert list(load(tmp_path / "small").config.time_step_limit) == [0.0, float("inf")]


def test_a_quantised_model_whose_package_is_missing_is_refused_at_once(tmp_path: Path) -> None:
    make_family("llama", tmp_path / "model")
    edit_config(tmp_path / "model", quantization_config={"quant_method": "gptq", "bits": 4, "dataset": "c4"})
    with pytest.raises(UserError, match=r"model cannot be laid out here: .*[Oo]ptimum"):
        rewrite_checkpoint(tmp_path / "model", tmp_path / "small", [0, 1, 7])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
