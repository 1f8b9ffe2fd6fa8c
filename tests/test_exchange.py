"""Plans of other tools, read and written; and patterns that serving engines know by the layer's number."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from families import FAMILIES, make_family

from mpruner_dist.config import PlanConfig
from mpruner_dist.errors import UserError
from mpruner_dist.exchange import layer_reduction, mergekit_plan, read_any_plan
from mpruner_dist.models.serving import PATTERNS, kinds_and_pattern, portability
from mpruner_dist.models.stacks import run_stacks
from mpruner_dist.plan import nearest_matching
from mpruner_dist.planning.planner import make_plan
from mpruner_dist.rewriting.export import export_plan, require_one_stack
from mpruner_dist.rewriting.rewrite import rewrite_checkpoint


@pytest.mark.parametrize("kept", [[0], [0, 1, 2, 7], [3, 4, 6], list(range(8))])
def test_a_plan_comes_back_from_every_form(tmp_path: Path, kept: list[int]) -> None:
    make_family("llama", tmp_path / "model")
    for name in ("plan.yaml", "plan.json"):
        export_plan(tmp_path / "model", kept, tmp_path / name)
        assert read_any_plan(tmp_path / name) == kept
    reduction = json.loads((tmp_path / "plan.json").read_text())["compression_training"]["layer_reduction"]
    assert reduction["module_name_prefix"] == "model.layers"
    assert reduction["other_module_name"] == ["model.embed_tokens", "model.norm"]
    merge = yaml.safe_load((tmp_path / "plan.yaml").read_text())
    assert (merge["merge_method"], merge["dtype"]) == ("passthrough", "float32")
    with pytest.raises(UserError, match=r"end it in \.yaml for mergekit or in \.json for DeepSpeed"):
        export_plan(tmp_path / "model", kept, tmp_path / "plan.txt")
    with pytest.raises(UserError, match="stacks by name"):
        require_one_stack(tmp_path / "model", {"layers": kept}, tmp_path / "plan.yaml")


@pytest.mark.parametrize("family", ["t5", "resnet"])
@pytest.mark.parametrize("name", ["plan.yaml", "plan.json"])
def test_several_stacks_are_refused_before_anything_is_written(
    tmp_path: Path, command: Any, family: str, name: str
) -> None:
    """Their layers, counted one after another, mean nothing to other tools."""
    model = make_family(family, tmp_path / "model")
    depth = sum(stack.depth for stack in run_stacks(model))
    (tmp_path / "run.json").write_text(json.dumps({"num_layers": depth, "kept": list(range(depth))}))
    code, output = command(
        "rewrite", tmp_path / "model", tmp_path / "small", "--plan", tmp_path / "run.json", "--export", tmp_path / name
    )
    assert code == 2
    assert f"knows plans for several stacks, and a model of type '{family}' has encoder" in output.replace(
        "resnet.e", "e"
    )
    assert {path.name for path in tmp_path.iterdir()} == {"model", "run.json"}


def test_ranges_of_mergekit_end_before_their_second_number() -> None:
    plan = mergekit_plan([0, 1, 2, 5, 7], "m", "bfloat16")
    assert [part["sources"][0]["layer_range"] for part in plan["slices"]] == [[0, 3], [5, 6], [7, 8]]
    names = ["h.0.w", "h.1.w", "wte.weight", "ln.weight", "ln.bias"]
    reduction = layer_reduction([1], names, "h")["compression_training"]["layer_reduction"]
    assert reduction["other_module_name"] == ["wte", "ln"]


def one(begin: int, end: float, model: str = "m", **more: Any) -> dict[str, Any]:
    return {"sources": [{"model": model, "layer_range": [begin, end], **more}]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"slices": [one(0, 4), one(2, 8)], "merge_method": "passthrough"}, "repeats or reorders layers"),
        ({"slices": [one(4, 8), one(0, 4)], "merge_method": "passthrough"}, "repeats or reorders layers"),
        (
            {"slices": [one(0, 4), one(4, 8, "other")], "merge_method": "passthrough"},
            "more than leave layers of one model",
        ),
        ({"slices": [one(0, 4)], "merge_method": "slerp"}, "more than leave layers of one model"),
        ({"slices": [one(0, 4, parameters={"scale": 0.5})], "merge_method": "passthrough"}, "more than leave layers"),
        (
            {"slices": [one(0, 4) | {"parameters": {"scale": 0.5}}], "merge_method": "passthrough"},
            "more than leave layers",
        ),
        ({"slices": [one(0, 4)], "merge_method": "passthrough", "parameters": {"scale": 0}}, "more than leave layers"),
        ({"slices": [one(0, 4), one(8, 6)], "merge_method": "passthrough"}, r"layer_range \[8, 6\] is none"),
        ({"slices": [one(0, 3.7)], "merge_method": "passthrough"}, r"layer_range \[0, 3\.7\] is none"),
        ({"slices": [{"sources": []}, {}], "merge_method": "passthrough"}, "no mergekit configuration with slices"),
        ({"layer_reduction": {"teacher_layer": [1, 3], "keep_number_layer": 3}}, "keep_number_layer is not 2"),
        ({"layer_reduction": {"teacher_layer": [3, 1]}}, "repeats or reorders"),
        ({"layer_reduction": {"enabled": True}}, "has no list teacher_layer"),
        ({"layer_reduction": {"enabled": False, "teacher_layer": [1, 3]}}, "is not enabled"),
        ({"compression_training": None}, "num_layers"),
        ({"compression_training": [1]}, "num_layers"),
        ([1, 2], "holds no table"),
        ({"kept": [0]}, "num_layers"),
    ],
)
def test_what_does_more_than_leave_layers_out_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    (tmp_path / "plan.yaml").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        read_any_plan(tmp_path / "plan.yaml")


def test_json_may_be_indented_by_tabs(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({"num_layers": 3, "kept": [0, 2]}, indent="\t"))
    keep: Any = read_any_plan(tmp_path / "plan.json")
    assert keep.kept == [0, 2]


def test_every_pattern_is_that_of_its_family_unpruned() -> None:
    """As the family's own class lays the layers out: else the table would be wrong."""
    for pattern in PATTERNS:
        for family in pattern.families:
            known = FAMILIES.get(family)
            settings = {} if known is None else {n: v for n, v in known[1].items() if n != "num_hidden_layers"}
            config = transformers.AutoConfig.for_model(family, **settings, num_hidden_layers=24)
            lines = [line for line in portability(config) if line.startswith(pattern.engine)]
            assert any("its pattern survived" in line for line in lines), (pattern, lines)


def test_a_broken_pattern_is_told_and_refused_if_so_asked(tmp_path: Path) -> None:
    make_family("gpt_oss", tmp_path / "model")
    rewrite_checkpoint(tmp_path / "model", tmp_path / "small", [0, 1, 3, 4])
    lines = portability(transformers.AutoConfig.from_pretrained(tmp_path / "small"))
    assert any(line.startswith("vLLM: takes layers [2, 3] for another kind") for line in lines)
    with pytest.raises(UserError, match=r"break the pattern .*the nearest 4 that keep it: 0-1,4,7"):
        rewrite_checkpoint(tmp_path / "model", tmp_path / "other", [0, 1, 4, 6], preserve_pattern=True)
    rewrite_checkpoint(tmp_path / "model", tmp_path / "other", [0, 1, 4, 7], preserve_pattern=True)
    lines = portability(transformers.AutoConfig.from_pretrained(tmp_path / "other"))
    assert [line.partition(":")[0] for line in lines if "survived" in line] == ["vLLM", "TensorRT-LLM", "llama.cpp"]


def test_a_family_without_kinds_has_no_pattern(tmp_path: Path) -> None:
    make_family("llama", tmp_path / "model")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "model")
    assert kinds_and_pattern(config) is None
    assert "vLLM: no pattern by layer number is known of llama" in portability(config)
    rewrite_checkpoint(tmp_path / "model", tmp_path / "small", [1, 2], preserve_pattern=True)


def test_the_planner_keeps_a_pattern() -> None:
    depth, period = 12, 3
    cka = [[0.9 if abs(a - b) == 1 else 1.0 if a == b else 0.5 for b in range(depth)] for a in range(depth)]
    kinds = [layer % period == period - 1 for layer in range(depth)]
    config = PlanConfig(method="partition", keep_layers=7, protect_last=0)
    plan = make_plan(cka, config, pattern=(kinds, kinds))
    assert len(plan.kept) == 7
    assert [kinds[layer] for layer in plan.kept] == kinds[:7]
    assert plan.reasons.keys() == {str(layer) for layer in plan.dropped}
    with pytest.raises(UserError, match=r"leave out layers \[11\], which plan\.protect_first and"):
        make_plan(cka, PlanConfig(method="partition", keep_layers=7), pattern=(kinds, kinds))
    never = [False] * depth
    with pytest.raises(UserError, match=r"plan\.preserve_pattern: no 7 layers keep"):
        make_plan(cka, PlanConfig(method="partition", keep_layers=7), pattern=(never, kinds))


@pytest.mark.parametrize(
    ("have", "need", "wanted", "found"),
    [
        ("abab", "ab", [2, 3], [2, 3]), ("abab", "ab", [0, 3], [0, 3]), ("abab", "aab", [0], [0, 2, 3]),
        ("abab", "bb", [0, 1], [1, 3]), ("aaaa", "ab", [0], None), ("ab", "", [], []),
    ],
)  # fmt: skip
def test_nearest_matching(have: str, need: str, wanted: list[int], found: list[int] | None) -> None:
    assert nearest_matching(have, need, wanted) == found
