"""Every family: prune, reload, and compare with the original that skips the layers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import DECODERS, inputs_of, make_family
from safetensors.torch import load_file, save_file

from mpruner_dist.errors import StageFailure, UserError
from mpruner_dist.models.blocks import skipped
from mpruner_dist.models.config_fields import renumber_names
from mpruner_dist.models.stacks import choose_stacks, find_stacks
from mpruner_dist.plan import Plan, parse_layers
from mpruner_dist.rewriting.proof import compare_logits, verify_checkpoint
from mpruner_dist.rewriting.rewrite import rewrite_checkpoint

KEPT = {
    "first third": [3, 4, 5, 6, 7],
    "scattered": [0, 2, 3, 7],
    "last": [0, 1, 2, 3, 4, 5, 6],
    "alternate": [1, 3, 5, 7],
}


def load(folder: Path) -> Any:
    config = transformers.AutoConfig.from_pretrained(folder)
    return getattr(transformers, config.architectures[0]).from_pretrained(folder, attn_implementation="eager").eval()


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs_of(model)).logits


def check(source: Path, small: Path, kept: dict[str, list[int]], generates: bool) -> None:
    """Logits, and tokens with and without the cache, are those of the original that skips the layers."""
    original, pruned = load(source), load(small)
    chosen = choose_stacks(find_stacks(original), original.config, kept)
    whole = logits_of(original)
    found = logits_of(pruned)
    [(stack, layers)] = chosen.items()
    blocks = original.get_submodule(stack.name)
    with skipped(blocks, [layer for layer in range(stack.depth) if layer not in layers]):
        torch.testing.assert_close(found, logits_of(original), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(found, whole, rtol=1e-2, atol=1e-2)  # the layers did something
        if generates:
            first = {name: value[:1] for name, value in inputs_of(original).items() if not name.startswith("decoder")}
            how = {"max_new_tokens": 8, "do_sample": False}
            expected = original.generate(**first, **how, use_cache=False)
            for use_cache in (False, True):
                assert torch.equal(pruned.generate(**first, **how, use_cache=use_cache), expected)


@pytest.mark.parametrize("kind", DECODERS)
def test_a_decoder(kind: str, tmp_path: Path) -> None:
    make_family(kind, tmp_path / "model")
    [stack] = find_stacks(load(tmp_path / "model"))
    for where, kept in KEPT.items():
        rewrite_checkpoint(tmp_path / "model", tmp_path / where, kept)
        check(tmp_path / "model", tmp_path / where, {stack.name: kept}, generates=True)
        verify_checkpoint(tmp_path / where)


@pytest.mark.parametrize(
    ("kind", "kept"),
    [
        ("gemma3", {"language_model.layers": [0, 3, 5, 6]}),
        ("gemma3", {"vision_tower.encoder.layers": [1, 2, 7]}),
        *[(kind, {"": kept}) for kind in ("bert", "roberta", "distilbert", "vit", "dinov2") for kept in KEPT.values()],
        *[(kind, {stack: kept}) for kind in ("whisper", "bart") for stack in ("encoder", "decoder")
          for kept in ([0, 2, 3], [2, 3, 4], [0, 1, 2, 3])],
        *[("t5", {"encoder": kept}) for kept in ([0, 2, 3, 4], [1, 2, 3, 4], [0, 1, 2])],
        *[("t5", {"decoder": kept}) for kept in ([0, 3], [1, 2], [0, 1, 2])],
        ("t5gemma", {"encoder": [0, 3, 4, 7]}), ("t5gemma", {"decoder": [0, 1, 4, 5]}),
        ("switch_transformers", {"encoder": [0, 1, 4, 5]}), ("switch_transformers", {"decoder": [2, 3]}),
        ("resnet", {"stages.2.layers": [0, 3]}), ("resnet", {"stages.0.layers": [1]}),
        ("convnext", {"stages.2.layers": [1, 3]}), ("convnext", {"stages.1.layers": [2]}),
        ("swin", {"layers.2.blocks": [0, 1, 4, 5]}), ("swin", {"layers.2.blocks": [2, 5]}),
        ("jamba", {"": [0, 1, 2, 3, 4, 5, 6, 7]}), ("jamba", {"": [0, 3, 2 + 8, 3 + 8, 4 + 8, 5 + 8]}),
    ],
)  # fmt: skip
def test_other_models(kind: str, kept: dict[str, list[int]], tmp_path: Path) -> None:
    make_family(kind, tmp_path / "model")
    named = kept if "" not in kept else {find_stacks(load(tmp_path / "model"))[0].name: kept[""]}
    rewrite_checkpoint(tmp_path / "model", tmp_path / "small", named)
    check(tmp_path / "model", tmp_path / "small", named, generates=kind in ("gemma3", "bart", "t5"))
    verify_checkpoint(tmp_path / "small")


@pytest.mark.parametrize(
    ("kind", "architecture"),
    [
        ("t5", None), ("bart", None), ("bert", None), ("bert", "BertForSequenceClassification"), ("bert", "BertModel"),
        ("gpt2", "GPT2ForSequenceClassification"),
    ],
)  # fmt: skip
def test_verify_runs_any_model_of_text_beside_its_original(kind: str, architecture: str | None, tmp_path: Path) -> None:
    model = make_family(kind, tmp_path / "model")
    if architecture is not None:
        getattr(transformers, architecture)(model.config).save_pretrained(tmp_path / "model")
    depth = sum(stack.depth for stack in find_stacks(model))
    kept = [layer for layer in range(depth) if layer not in (1, depth - 2)]
    rewrite_checkpoint(tmp_path / "model", tmp_path / "small", Plan.keeping(depth, kept))
    assert compare_logits(tmp_path / "small", tmp_path / "model") < 1e-5
    tensors = load_file(tmp_path / "small" / "model.safetensors")
    changed = {name: tensor + 0.1 for name, tensor in tensors.items()}
    save_file(changed, tmp_path / "small" / "model.safetensors", {"format": "pt"})
    with pytest.raises(StageFailure, match=rf"with layers \[1, {depth - 2}\] skipped"):
        compare_logits(tmp_path / "small", tmp_path / "model")


@pytest.mark.parametrize(("kind", "reads"), [("resnet", "pixel_values"), ("whisper", "input_features")])
def test_verify_runs_no_other_beside_its_original(kind: str, reads: str, tmp_path: Path) -> None:
    make_family(kind, tmp_path / "model")
    with pytest.raises(UserError, match=f"only models of text are run beside their original, and .* reads {reads}"):
        compare_logits(tmp_path / "model", tmp_path / "model")


def test_a_map_of_one_of_several_stacks_does_not_say_which(tmp_path: Path) -> None:
    make_family("bart", tmp_path / "model")
    rewrite_checkpoint(tmp_path / "model", tmp_path / "small", {"encoder": [0, 2]})
    with pytest.raises(UserError, match=r"layer_map\.json does not say which layers were kept"):
        compare_logits(tmp_path / "small", tmp_path / "model")


@pytest.mark.parametrize(
    ("kind", "kept", "message"),
    [
        ("jamba", {"": [0, 2, 3]}, r"layer 2 of model\.layers would become another: .*The nearest that can be kept: 0"),
        (
            "gemma3n_text",
            {"": [0, 1, 2, 3, 4, 5]},
            r"embed_tokens_per_layer\.weight would be \[128, 48\], is \[128, 80\]",
        ),
        ("switch_transformers", {"encoder": [0, 2, 3]}, r"layer 2 of encoder\.block would become another"),
        ("deberta-v2", {"": [1, 2]}, r"layer 0 of \S+ is the one behind which a convolution of its input is added"),
        ("longformer", {"": [0, 2]}, r"attention_window"),
        ("prophetnet", {"encoder": [0, 2]}, r"cannot say that generation caches \d layers: .*num_hidden_layers"),
        ("minimax", {"": [0, 2, 3]}, r"self_attn\.\w+ would be .*, was "),  # decays by the number of the layer
        ("resnet", {"stages.2.layers": [1, 3]}, r"shortcut\.class would be .*The nearest that can be kept: 0,3"),
        ("swin", {"layers.2.blocks": [0, 2, 3]}, r"shift_size would be 2, was 0.*The nearest that can be kept: 0,3-4"),
        (
            "bart",
            {"": [0, 1]},
            r"several stacks: model\.encoder\.layers \(5\), model\.decoder\.layers \(5\); say which",
        ),
        ("bart", {"coder": [0, 1]}, r"'coder' fits none; the stacks are: model\.encoder\.layers \(5\)"),
        ("resnet", {"layers": [0]}, r"'layers' fits resnet\.encoder\.stages\.0\.layers, resnet"),
        ("convnext", {"stages.1.layers": []}, r"kept is empty"),
    ],
)
def test_what_cannot_be_expressed_is_refused_with_the_nearest_plan(
    kind: str, kept: dict[str, list[int]], message: str, tmp_path: Path
) -> None:
    make_family(kind, tmp_path / "model")
    with pytest.raises(UserError, match=message) as refused:
        rewrite_checkpoint(tmp_path / "model", tmp_path / "small", kept.get("", kept))
    assert not list(tmp_path.glob("*small*"))
    _, nearest, layers = str(refused.value).partition("The nearest that can be kept: ")
    if nearest:  # what is proposed can be done
        [name] = kept
        rewrite_checkpoint(
            tmp_path / "model", tmp_path / "small", {name: parse_layers(layers)} if name else parse_layers(layers)
        )
        verify_checkpoint(tmp_path / "small")


def edit_config(folder: Path, remove: tuple[str, ...] = (), **changes: Any) -> None:
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({n: v for n, v in stored.items() if n not in remove} | changes))


@pytest.mark.parametrize(
    ("kind", "remove", "changes"),
    [
        ("gemma2", ("layer_types", "dtype"), {"torch_dtype": "float32"}),
        ("gemma3_text", ("layer_types", "dtype"), {"torch_dtype": "float32", "sliding_window_pattern": 3}),
        ("qwen2", ("layer_types",), {"max_window_layers": 3}),
        ("cohere2", ("layer_types",), {"sliding_window_pattern": 3}),
        ("llama4_text", ("layer_types", "no_rope_layers", "moe_layers"), {"no_rope_layer_interval": 3}),
        ("smollm3", ("layer_types", "no_rope_layers"), {"no_rope_layer_interval": 3}),
        ("gpt2", ("n_layer",), {"num_hidden_layers": 8}),
        ("bart", (), {"num_hidden_layers": 5}),
        ("t5", ("num_decoder_layers",), {"num_layers": 4}),
    ],
)
def test_a_configuration_as_it_lies_on_the_hub(
    kind: str, remove: tuple[str, ...], changes: dict[str, Any], tmp_path: Path
) -> None:
    """Older files leave lists out, that the class computes from the depth, and give fields by other names."""
    make_family(kind, tmp_path / "model", **({"num_layers": 4} if kind == "t5" else {}))
    edit_config(tmp_path / "model", remove, **changes)
    stacks = find_stacks(load(tmp_path / "model"))
    for stack in stacks:
        kept = (
            [0, 2, 3]
            if len(stacks) > 1 and "decoder" in stack.name
            else [layer for layer in (0, 2, 3, 7) if layer < stack.depth]
        )
        if kind == "t5" and "encoder" in stack.name:
            continue  # fewer than the decoder has are refused
        rewrite_checkpoint(tmp_path / "model", tmp_path / stack.name, {stack.name: kept})
        check(tmp_path / "model", tmp_path / stack.name, {stack.name: kept}, generates=True)


def add_next_token_layer(folder: Path, depth: int) -> None:
    """As DeepSeek and GLM have it: one more layer, which transformers does not load."""
    tensors = load_file(folder / "model.safetensors")
    last = f"model.layers.{depth - 1}."
    extra = {n.replace(last, f"model.layers.{depth}."): t + 1 for n, t in tensors.items() if n.startswith(last)}
    save_file(tensors | extra, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4_moe"])
def test_layers_that_predict_further_tokens_stay_or_go(kind: str, tmp_path: Path) -> None:
    make_family(kind, tmp_path / "model", num_nextn_predict_layers=1)
    add_next_token_layer(tmp_path / "model", 8)
    before = load_file(tmp_path / "model" / "model.safetensors")
    for drop in (False, True):
        small = tmp_path / f"drop {drop}"
        rewrite_checkpoint(tmp_path / "model", small, [0, 2, 7], drop_next_token=drop)
        after = load_file(small / "model.safetensors")
        moved = {n for n in after if n.startswith("model.layers.3.")}
        assert len(moved) == (0 if drop else len([n for n in before if n.startswith("model.layers.8.")]))
        for name in moved:
            assert torch.equal(after[name], before[name.replace("layers.3.", "layers.8.")])
        assert json.loads((small / "config.json").read_text())["num_nextn_predict_layers"] == (0 if drop else 1)
        check(tmp_path / "model", small, {"layers": [0, 2, 7]}, generates=True)


def test_further_layers_that_no_field_announces_are_refused(tmp_path: Path) -> None:
    make_family("llama", tmp_path / "model")
    add_next_token_layer(tmp_path / "model", 8)
    with pytest.raises(UserError, match=r"asks for 8 layers, the tensors model\.layers\.N\.\* have layers \[8\] too"):
        rewrite_checkpoint(tmp_path / "model", tmp_path / "small", [0, 2, 7])


def test_two_stacks_at_once_and_the_heads_that_align(tmp_path: Path) -> None:
    make_family("whisper", tmp_path / "model")
    generation = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    generation["alignment_heads"] = [[0, 1], [1, 3], [4, 0]]
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(generation))
    rewrite_checkpoint(tmp_path / "model", tmp_path / "small", {"encoder": [0, 4], "decoder": [1, 3, 4]})
    generation = json.loads((tmp_path / "small" / "generation_config.json").read_text())
    assert generation["alignment_heads"] == [[0, 3], [2, 0]]
    stacks = json.loads((tmp_path / "small" / "layer_map.json").read_text())["stacks"]
    assert stacks["model.decoder.layers"]["new_to_old"] == [1, 3, 4]
    small = load(tmp_path / "small")
    assert (len(small.model.encoder.layers), len(small.model.decoder.layers)) == (2, 3)


def test_names_in_quantisation_settings_follow_their_layers(tmp_path: Path) -> None:
    settings = {"modules_to_not_convert": ["lm_head", "model.layers.1.mlp.gate", "model.layers.3.mlp.gate"], "bits": 4}
    assert renumber_names(settings, "model.layers", 4, [0, 3]) == {
        "modules_to_not_convert": ["lm_head", "model.layers.1.mlp.gate"], "bits": 4
    }  # fmt: skip
    further = {"ignore": ["model.layers.4.eh_proj"], "bits": {"model.layers.3.mlp": 8, "model.layers.2.mlp": 8, "*": 4}}
    assert renumber_names(further, "model.layers", 4, [0, 3]) == {
        "ignore": ["model.layers.2.eh_proj"], "bits": {"model.layers.1.mlp": 8, "*": 4}
    }  # fmt: skip
    assert renumber_names(further, "model.layers", 4, [0, 3], keep_next=False)["ignore"] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["full_attention"] * 7}, r"cannot read .*config\.json: .*layer_types"),
        ({"num_attention_heads": 0}, r"config\.json of type 'qwen2' makes no Qwen2ForCausalLM"),
        ({"num_hidden_layers": "eight"}, r"config\.json"),
        ({"model_type": "no such"}, r"cannot read .*config\.json"),
        (
            {"num_hidden_layers": 9, "layer_types": None},
            r"asks for 9 layers, the tensors model\.layers\.N\.\* lack layers \[8\]",
        ),
    ],
)
def test_a_configuration_that_makes_no_sense(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    make_family("qwen2", tmp_path / "model")
    edit_config(tmp_path / "model", **changes)
    with pytest.raises(UserError, match=f"(?s){message}"):
        rewrite_checkpoint(tmp_path / "model", tmp_path / "small", [0, 1, 7])
