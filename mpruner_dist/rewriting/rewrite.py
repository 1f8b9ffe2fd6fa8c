"""A smaller checkpoint from a larger one, file to file: no model is built and no tensor passes through memory."""

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mpruner_dist.checkpoints.copying import copy_tensors
from mpruner_dist.checkpoints.folder import (
    INDEX_NAME,
    CheckpointFolder,
    index_json,
    read_checkpoint,
    shard_name,
)
from mpruner_dist.checkpoints.header import TensorInfo, read_header
from mpruner_dist.checkpoints.naming import layer_of
from mpruner_dist.errors import UserError
from mpruner_dist.models.blocks import num_layers
from mpruner_dist.models.config_fields import prune_config
from mpruner_dist.models.loading import read_config
from mpruner_dist.models.naming import block_prefix
from mpruner_dist.plan import Plan
from mpruner_dist.rewriting.proof import Claim, prove
from mpruner_dist.runs.commit import commit_folder, disk_errors, require_space, write_json
from mpruner_dist.runs.digest import digest

log = logging.getLogger(__name__)

WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack"}
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class ShardCopy:
    """One output shard: which tensors of which file, under which names."""

    source: Path
    target: Path
    tensors: list[tuple[TensorInfo, str]]
    metadata: dict[str, str]


def run_here(function: Callable[[Item], Result], items: list[Item]) -> list[Result]:
    """Do tasks one after another in this process."""
    results = []
    for number, item in enumerate(items, 1):
        results.append(function(item))
        log.info("  %s: %d of %d done", function.__name__.replace("_", " "), number, len(items))
    return results


def rewrite_checkpoint(
    source: Path,
    target: Path,
    kept: list[int],
    *,
    trust_remote_code: bool = False,
    run_tasks: Callable[[Callable[[Any], Any], list[Any]], list[Any]] = run_here,
) -> None:
    """Write to `target` the checkpoint `source` without the layers that `kept` leaves out, proven right.

    An interrupted rewrite goes on with the shards that are missing. `target` appears only when all is proven.

    Args:
        source: a Hugging Face folder of safetensors files.
        target: a folder; an earlier rewrite there is replaced.
        kept: layers to keep, ascending, counted from 0.
        trust_remote_code: run model code that lies in `source`.
        run_tasks: how the shards are copied: `run_here`, or as Ray tasks.

    Raises:
        UserError: the source, the target or the plan cannot be used.
        StageFailure: no space, or the result is not right.
    """
    checkpoint = read_checkpoint(source)
    _require_target(source, target)
    config = read_config(source, trust_remote_code)
    plan = Plan.keeping(num_layers(config), kept)
    prefix = block_prefix(checkpoint, config, trust_remote_code)
    stored = prune_config(checkpoint.config, config, plan.kept)
    partial = target.with_name(f".{target.name}.partial-{digest([checkpoint.fingerprint(), plan.kept])}")
    copies = plan_copies(checkpoint, prefix, plan.kept, partial)
    with disk_errors(target):
        partial.mkdir(parents=True, exist_ok=True)
        require_space(
            partial,
            sum(info.num_bytes for copy in copies if not copy.target.exists() for info, _ in copy.tensors),
        )
        run_tasks(copy_shard, copies)
        _copy_companions(source, partial)
    write_json(partial / "config.json", stored)
    if len(copies) > 1:
        write_json(partial / INDEX_NAME, index_json({copy.target.name: read_header(copy.target) for copy in copies}))
    write_json(partial / "layer_map.json", layer_map(plan))
    run_tasks(prove, [Claim(source, partial, plan, trust_remote_code)])
    commit_folder(partial, target)
    for leftover in target.parent.glob(f".{target.name}.partial-*"):
        shutil.rmtree(leftover)


def layer_map(plan: Plan) -> dict[str, Any]:
    """Content of `layer_map.json`."""
    return {"old_to_new": {str(old): new for new, old in enumerate(plan.kept)}, "new_to_old": plan.kept}


def plan_copies(checkpoint: CheckpointFolder, prefix: str, kept: list[int], folder: Path) -> list[ShardCopy]:
    """One copy for each source shard of which anything is kept; tensors stay in the order of their bytes."""
    new_index = {old: new for new, old in enumerate(kept)}
    wanted: list[tuple[str, list[tuple[TensorInfo, str]]]] = []
    for name, header in checkpoint.shards.items():
        tensors = []
        for tensor, info in header.tensors.items():
            layer = layer_of(tensor, prefix)
            if layer is None:
                tensors.append((info, tensor))
            elif layer in new_index:
                rest = tensor.removeprefix(f"{prefix}.{layer}.")
                tensors.append((info, f"{prefix}.{new_index[layer]}.{rest}"))
        if tensors:
            wanted.append((name, tensors))
    return [
        ShardCopy(
            checkpoint.path / name,
            folder / shard_name(number, len(wanted)),
            tensors,
            checkpoint.shards[name].metadata,
        )
        for number, (name, tensors) in enumerate(wanted, 1)
    ]


def copy_shard(copy: ShardCopy) -> None:
    """Write one shard whole or not at all; one that stands already is left alone."""
    if copy.target.exists():
        return
    temporary = copy.target.with_suffix(".tmp")
    try:
        copy_tensors(copy.source, temporary, copy.tensors, copy.metadata)
        temporary.replace(copy.target)
    finally:
        temporary.unlink(missing_ok=True)


def _copy_companions(source: Path, folder: Path) -> None:
    """Tokenizer, chat template, generation configuration, remote code, licence: every file that holds no weights."""
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix not in WEIGHT_SUFFIXES and not file.name.endswith(".index.json"):
            shutil.copyfile(file, folder / file.name)


def _require_target(source: Path, target: Path) -> None:
    inside = target.resolve()
    if inside == source.resolve() or source.resolve() in inside.parents:
        raise UserError(f"the target {target} is, or lies in, the source {source}: give another folder")
    if target.exists() and not (target / "layer_map.json").is_file() and (target.is_file() or any(target.iterdir())):
        raise UserError(f"the target {target} exists and is no rewritten checkpoint: give another folder")
