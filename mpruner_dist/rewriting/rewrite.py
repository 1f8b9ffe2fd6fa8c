"""A smaller checkpoint from a larger one, file to file: no tensor passes through memory."""

import json
import logging
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mpruner_dist.checkpoints.folder import INDEX_NAME, index_json, with_tagged_floats
from mpruner_dist.checkpoints.formats import open_checkpoint
from mpruner_dist.checkpoints.header import read_header
from mpruner_dist.checkpoints.naming import layer_of
from mpruner_dist.checkpoints.stored import StoredCheckpoint
from mpruner_dist.data.model_folder import read_config
from mpruner_dist.errors import UserError
from mpruner_dist.models.config_fields import NEXT_TOKEN_FIELDS, renumber_names
from mpruner_dist.models.loading import empty_model, key_problems
from mpruner_dist.models.naming import model_names, stack_prefix
from mpruner_dist.models.serving import kinds_and_pattern
from mpruner_dist.models.signature import FIRST_ONLY
from mpruner_dist.models.stacks import choose_stacks, find_stacks, run_stacks
from mpruner_dist.plan import Keep, Plan, by_stack, format_layers, nearest_matching
from mpruner_dist.rewriting.finished import LAYER_MAP, Request, clear_beside, is_finished, is_rewritten, layer_map
from mpruner_dist.rewriting.layout import ShardCopy, StackNames, copy_shard, new_names, plan_copies
from mpruner_dist.rewriting.proof import Claim, prove
from mpruner_dist.rewriting.shrink import Kept, Skeleton, shrink
from mpruner_dist.runs.commit import commit_folder, disk_errors, require_space, write_json

log = logging.getLogger(__name__)

WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".distcp"}
COMPANION_SUFFIXES = {".json", ".jinja", ".txt", ".model", ".py", ".md", ".spm"}
TRAINING_FILES = {"latest", "latest_universal", "zero_to_fp32.py", ".metadata", LAYER_MAP}
AT_ONCE = 4
"""Files that are copied at once where no Ray spreads them: one alone does not fill a fast disk."""
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Rewrite:
    """All that is decided before the first byte is copied."""

    stored: dict[str, Any]
    kept: Kept
    renamed: dict[str, str]
    strange: set[str]
    """Tensors, as the model names them, that the original's model did not ask for either."""

    @property
    def kept_by_name(self) -> dict[str, list[int]]:
        """What is kept, by the names of the stacks."""
        return {stack.name: layers for stack, layers in self.kept.items()}


@dataclass(frozen=True)
class Options:
    """How a checkpoint is rewritten; as for `rewrite_checkpoint`."""

    drop_next_token: bool = False
    preserve_pattern: bool = False
    trust_remote_code: bool = False


def run_here(function: Callable[[Item], Result], items: list[Item]) -> list[Result]:
    """`[function(item) for item in items]` in this process, some at a time: the kernel copies, Python waits."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        tasks = [pool.submit(function, item) for item in items]
        try:
            for number, task in enumerate(as_completed(tasks), 1):
                task.result()
                log.info("  %s: %d of %d done", function.__name__.replace("_", " "), number, len(items))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        return [task.result() for task in tasks]


def rewrite_checkpoint(
    source: Path,
    target: Path,
    kept: Keep,
    *,
    config_folder: Path | None = None,
    max_shard_bytes: int | None = None,
    drop_next_token: bool = False,
    preserve_pattern: bool = False,
    trust_remote_code: bool = False,
    run_tasks: Callable[[Callable[[Any], Any], list[Any]], list[Any]] = run_here,
) -> None:
    """Write to `target` the checkpoint `source` without the layers that `kept` leaves out, proven right.

    An interrupted rewrite goes on with the files that are missing. `target` appears only when all is proven; one that
    is finished is left alone.

    Args:
        source: a Hugging Face folder, a DeepSpeed checkpoint or a torch distributed checkpoint.
        target: a folder; an earlier rewrite there is replaced.
        kept: layers to keep, ascending, counted from 0; those of several stacks, by name; or a plan.
        config_folder: where config.json and the tokenizer lie, if not in `source`.
        max_shard_bytes: fill files up to so many bytes; None leaves together what lies together in `source`.
        drop_next_token: leave out layers that predict further tokens.
        preserve_pattern: refuse a plan after which a serving engine would take a layer for one of another kind.
        trust_remote_code: run model code that lies in `source`.
        run_tasks: how the files are copied: `run_here`, or as Ray tasks.

    Raises:
        UserError: the source, the target or the plan cannot be used.
        StageFailure: no space, or the result is not right.
    """
    checkpoint = open_checkpoint(source, config_folder)
    require_target(checkpoint, target)
    request = Request(checkpoint, kept, max_shard_bytes, drop_next_token, preserve_pattern)
    if is_finished(request, target):
        clear_beside(target)
        return
    options = Options(drop_next_token, preserve_pattern, trust_remote_code)
    rewrite = prepare(checkpoint, kept, options)
    partial = target.with_name(f".{target.name}.partial-{request.digest}")
    copies = plan_copies(checkpoint, rewrite.renamed, partial, max_shard_bytes)
    with disk_errors(target):
        partial.mkdir(parents=True, exist_ok=True)
        require_space(partial, sum(copy.num_bytes for copy in copies if not copy.is_done))
        run_tasks(copy_shard, copies)
        copy_companions(checkpoint.companions, partial, rewrite.kept)
    _write_descriptions(partial, copies, rewrite, request)
    run_tasks(prove, [Claim(checkpoint.companions, partial, rewrite.strange, trust_remote_code)])
    commit_folder(partial, target)
    clear_beside(target)


def prepare(checkpoint: StoredCheckpoint, kept: Keep, options: Options) -> Rewrite:
    """Decide what stays under which name, and prove on the meta device that the layers stay what they are.

    Raises:
        UserError: what cannot be expressed.
    """
    config = read_config(checkpoint.companions, options.trust_remote_code)
    if "quantization_config" in checkpoint.config and checkpoint.path == checkpoint.companions:
        key_problems(checkpoint.path, options.trust_remote_code)  # whether its layout can be proven here
    whole = Skeleton(checkpoint.config, config, empty_model(config, options.trust_remote_code))
    names = list(checkpoint.tensors)
    if isinstance(kept, Plan):
        chosen = layers_by_stack(whole.model, kept)
    else:
        chosen = choose_stacks(find_stacks(whole.model), config, kept)
    plans = {stack: Plan.keeping(stack.depth, layers).kept for stack, layers in chosen.items()}
    keep_next_token = not options.drop_next_token
    stacks = [
        StackNames(stack_prefix(whole.model, stack, names), stack.depth, layers, FIRST_ONLY, keep_next_token)
        for stack, layers in plans.items()
    ]
    _require_known_layers(checkpoint, stacks)
    if options.preserve_pattern:
        _require_pattern(config, plans)
    small = shrink(whole, plans, options.trust_remote_code)
    stored = small.stored
    if options.drop_next_token:
        stored = _without_next_token(stored)
    for stack in stacks:
        if "quantization_config" in stored:
            quantised = stored["quantization_config"]
            renumbered = renumber_names(quantised, stack.prefix, stack.depth, stack.kept, keep_next_token)
            stored = stored | {"quantization_config": renumbered}
    renamed = new_names(names, stacks)
    asked, state = model_names(whole.model, renamed), whole.model.state_dict().keys()
    unasked = [renamed[name] for name, (key, _) in asked.items() if key not in state]
    strange = {key for key, _ in model_names(small.model, unasked).values()}
    return Rewrite(stored, plans, _untied(renamed, checkpoint, whole.model), strange)


def _require_pattern(config: Any, plans: Kept) -> None:
    """Every layer stays of the kind that serving engines know its new number by."""
    known = kinds_and_pattern(config)
    for stack, layers in plans.items():
        if known is None or len(known[0]) != stack.depth:
            continue
        have, need = known
        if [have[layer] for layer in layers] != need[: len(layers)]:
            found = nearest_matching(have, need[: len(layers)], layers)
            nearest = "none" if found is None else format_layers(found)
            raise UserError(
                f"layers {format_layers(layers)} of {stack.name} break the pattern that serving engines know by the "
                f"number of the layer; the nearest {len(layers)} that keep it: {nearest}"
            )


def _untied(renamed: dict[str, str], checkpoint: StoredCheckpoint, model: Any) -> dict[str, str]:
    """Without second names of one tensor, which safetensors leaves out; other formats have both."""
    tied = getattr(model, "all_tied_weights_keys", {})
    tensors = checkpoint.tensors
    return {
        old: new
        for old, new in renamed.items()
        if not (old in tied and tied[old] in tensors and tensors[tied[old]].pieces == tensors[old].pieces)
    }


def _require_known_layers(checkpoint: StoredCheckpoint, stacks: list[StackNames]) -> None:
    """Layers after the last are such that predict further tokens, or the configuration is wrong."""
    for stack in stacks:
        layers = {layer_of(name, stack.prefix) or 0 for name in checkpoint.tensors}
        further = sorted(layer for layer in layers if layer >= stack.depth)
        if further and not any(_field(checkpoint.config, name) for name in NEXT_TOKEN_FIELDS):
            raise UserError(
                f"the configuration asks for {stack.depth} layers, the tensors {stack.prefix}.N.* have layers "
                f"{further} too: correct the number in config.json"
            )


def _field(stored: dict[str, Any], name: str) -> Any:
    return stored.get(name, stored.get("text_config", {}).get(name))


def _without_next_token(stored: dict[str, Any]) -> dict[str, Any]:
    changed = stored | {name: 0 for name in NEXT_TOKEN_FIELDS if name in stored}
    if "text_config" in changed:
        changed["text_config"] = _without_next_token(changed["text_config"])
    return changed


def _write_descriptions(folder: Path, copies: list[ShardCopy], rewrite: Rewrite, request: Request) -> None:
    write_json(folder / "config.json", with_tagged_floats(rewrite.stored))
    if len(copies) > 1:
        write_json(folder / INDEX_NAME, index_json({copy.target.name: read_header(copy.target) for copy in copies}))
    write_json(folder / LAYER_MAP, layer_map(rewrite.kept_by_name) | {"request": request.digest})


def layers_by_stack(model: Any, plan: Plan) -> Kept:
    """What a plan keeps of each stack: it counts the layers of all that a run prunes one after another.

    Raises:
        UserError: the plan is for another number of layers.
    """
    stacks = run_stacks(model)
    depth = sum(stack.depth for stack in stacks)
    if plan.num_layers != depth:
        raise UserError(f"the plan is for {plan.num_layers} layers, the model has {depth}")
    return dict(zip(stacks, by_stack(plan.kept, [stack.depth for stack in stacks]), strict=True))


def copy_companions(source: Path, folder: Path, kept: Kept) -> None:
    """Tokenizer, chat template, generation configuration, remote code, licence: every file that holds no weights.

    Of subfolders those that hold such files only, such as further chat templates; what is left out is told.
    """
    for file in sorted(source.iterdir()):
        is_weights = file.suffix in WEIGHT_SUFFIXES or file.name.endswith(".index.json") or file.name in TRAINING_FILES
        if file.is_file() and not is_weights:
            shutil.copyfile(file, folder / file.name)
        if not file.is_dir() or file.name.startswith(".") or file.name == "__pycache__":
            continue
        if all(inner.is_dir() or inner.suffix in COMPANION_SUFFIXES for inner in file.rglob("*")):
            shutil.copytree(file, folder / file.name, dirs_exist_ok=True)
        else:
            log.info("  left out: the folder %s of %s", file.name, source)
    generation = folder / "generation_config.json"
    content = json.loads(generation.read_text()) if generation.is_file() else {}
    for stack, layers in kept.items():
        if content.get("alignment_heads") and ".decoder." in f".{stack.name}.":  # Whisper: [layer, head] of the decoder
            heads = [[layers.index(layer), head] for layer, head in content["alignment_heads"] if layer in layers]
            write_json(generation, content | {"alignment_heads": heads or None})


def require_target(checkpoint: StoredCheckpoint, target: Path) -> None:
    """Refuse a target that would do harm.

    Raises:
        UserError: it lies in the source, holds it, or is something else.
    """
    if target.name in ("", ".."):
        raise UserError(f"the target {target} is a folder that is there already: name a new one")
    place = target.resolve()
    for folder in {checkpoint.path.resolve(), checkpoint.companions.resolve()}:
        if place == folder or folder in place.parents:
            raise UserError(f"the target {target} is, or lies in, the source {folder}: give another folder")
        if place in folder.parents:
            raise UserError(f"the target {target} holds the source {folder}: give another folder")
    if target.exists() and not is_rewritten(target) and (target.is_file() or any(target.iterdir())):
        raise UserError(
            f"the target {target} exists and is no rewritten checkpoint, or was trained since: give another folder"
        )
