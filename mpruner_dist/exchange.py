"""Plans in the form of other tools: DeepSpeed's `layer_reduction` and mergekit's passthrough."""

import json
from pathlib import Path
from typing import Any

import yaml

from mpruner_dist.errors import UserError
from mpruner_dist.plan import Keep, format_layers, read_plan


def read_any_plan(path: Path) -> Keep:
    """A plan.json, a DeepSpeed configuration with `layer_reduction`, or a mergekit YAML.

    Raises:
        UserError: none of them, or one that does more than leave layers out.
    """
    try:
        text = path.read_text()
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the plan {path}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is no plan: it holds no table")
    if "slices" in content or "merge_method" in content:
        return _from_mergekit(path, content)
    section = content.get("compression_training") or content
    reduction = section.get("layer_reduction") if isinstance(section, dict) else None
    if reduction is not None:
        return _from_deepspeed(path, reduction)
    return read_plan(path)


def _from_mergekit(path: Path, content: dict[str, Any]) -> list[int]:
    try:
        sources = [source for part in content["slices"] for source in part["sources"]]
        models = {source["model"] for source in sources}
        ranges = [(begin, end) for begin, end in (source["layer_range"] for source in sources)]
        single = all(len(part["sources"]) == 1 for part in content["slices"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no mergekit configuration with slices: {error}") from error
    for pair in ranges:
        if not all(type(layer) is int for layer in pair) or pair[0] >= pair[1]:
            raise UserError(f"{path}: layer_range {list(pair)} is none: [first, behind the last], both whole numbers")
    extra = [key for source in sources for key in source if key not in ("model", "layer_range")]
    extra += [key for part in content["slices"] for key in part if key != "sources"]
    extra += [key for key in content if key == "parameters"]
    if content.get("merge_method") != "passthrough" or len(models) != 1 or not single or extra:
        raise UserError(f"{path} does more than leave layers of one model out: passthrough without parameters is read")
    kept = [layer for begin, end in ranges for layer in range(begin, end)]
    return _ascending(path, kept)


def _from_deepspeed(path: Path, reduction: Any) -> list[int]:
    layers = reduction.get("teacher_layer") if isinstance(reduction, dict) else None
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise UserError(f"{path}: layer_reduction has no list teacher_layer of the layers to keep")
    if reduction.get("enabled") is False:
        raise UserError(f"{path}: layer_reduction is not enabled")
    if reduction.get("keep_number_layer", len(layers)) != len(layers):
        raise UserError(f"{path}: keep_number_layer is not {len(layers)}, the number of layers in teacher_layer")
    return _ascending(path, layers)


def _ascending(path: Path, kept: list[int]) -> list[int]:
    if kept != sorted(set(kept)):
        raise UserError(f"{path} repeats or reorders layers ({format_layers(kept)}): only leaving out can be done")
    return kept


def foreign_form(path: Path) -> str:
    """Which tool a file of this name is for: mergekit or DeepSpeed.

    Raises:
        UserError: neither.
    """
    forms = {".yaml": "mergekit", ".yml": "mergekit", ".json": "DeepSpeed"}
    if path.suffix not in forms:
        raise UserError(f"--export {path}: end it in .yaml for mergekit or in .json for DeepSpeed")
    return forms[path.suffix]


def yaml_text(content: dict[str, Any]) -> str:
    """YAML, keys in their order."""
    text: str = yaml.safe_dump(content, sort_keys=False)
    return text


def mergekit_plan(kept: list[int], model: str, dtype: str) -> dict[str, Any]:
    """A passthrough of the kept layers; mergekit's ranges end before their second number."""
    runs: list[list[int]] = []
    for layer in kept:
        if runs and runs[-1][1] == layer:
            runs[-1][1] += 1
        else:
            runs.append([layer, layer + 1])
    slices = [{"sources": [{"model": model, "layer_range": run}]} for run in runs]
    return {"slices": slices, "merge_method": "passthrough", "dtype": dtype}


def layer_reduction(kept: list[int], names: list[str], prefix: str) -> dict[str, Any]:
    """DeepSpeed's `compression_training.layer_reduction`: the student's layers are these of the teacher."""
    others = dict.fromkeys(name.rpartition(".")[0] for name in names if not name.startswith(f"{prefix}."))
    return {
        "compression_training": {
            "layer_reduction": {
                "enabled": True,
                "keep_number_layer": len(kept),
                "module_name_prefix": prefix,
                "teacher_layer": kept,
                "other_module_name": [other for other in others if other],
            }
        }
    }
