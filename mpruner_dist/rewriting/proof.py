"""A rewritten checkpoint counts only when proven: every name and shape is the one that its configuration asks for."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mpruner_dist.checkpoints.folder import INDEX_NAME, SINGLE_NAME, CheckpointFolder, read_checkpoint
from mpruner_dist.data.model_folder import read_config
from mpruner_dist.errors import StageFailure, UserError
from mpruner_dist.models.blocks import skipped
from mpruner_dist.models.loading import empty_model, key_problems, load_model, model_class
from mpruner_dist.models.stacks import Stack, run_blocks, run_stacks
from mpruner_dist.rewriting.finished import LAYER_MAP

TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
HALF_TOLERANCE = 2e-2  # bfloat16 and float16, as a share of the largest logit
PROOF_TOKENS = 32


@dataclass(frozen=True)
class Claim:
    """`target` is complete, as far as `source` was."""

    source: Path
    target: Path
    strange: set[str] = field(default_factory=set)
    """Tensors that no model asked for in the source either, such as buffers that older versions saved."""
    trust_remote_code: bool = False


def prove(claim: Claim) -> None:
    """Check files, names and shapes.

    Raises:
        StageFailure: what differs.
    """
    read_checkpoint(claim.target)
    allowed = {f"{name} is not asked for" for name in claim.strange}
    problems = [p for p in key_problems(claim.target, claim.trust_remote_code) if p not in allowed]
    if problems and any((claim.source / name).is_file() for name in (INDEX_NAME, SINGLE_NAME)):
        known = key_problems(claim.source, claim.trust_remote_code)  # what the original lacked outside the layers
        problems = [problem for problem in problems if problem not in known]
    if problems:
        raise StageFailure(
            f"the rewritten checkpoint {claim.target} does not fit its configuration: {'; '.join(problems[:3])}"
        )


def verify_checkpoint(folder: Path, trust_remote_code: bool = False) -> CheckpointFolder:
    """Check that every shard is whole and that names and shapes are those that the configuration asks for.

    Raises:
        UserError: what is wrong.
    """
    checkpoint = read_checkpoint(folder)
    problems = key_problems(folder, trust_remote_code)
    if problems:
        raise UserError(f"{folder} does not fit its configuration: {'; '.join(problems)}")
    return checkpoint


def compare_logits(folder: Path, original: Path, trust_remote_code: bool = False) -> float:
    """Run a pruned model beside its original with the layers skipped, one after the other in memory.

    Returns:
        The largest difference of a logit, as a share of the largest.

    Raises:
        UserError: the model reads no text, or the folder does not say which of its layers were kept.
        StageFailure: it is too large.
    """
    config = read_config(original, trust_remote_code)
    model = empty_model(config, trust_remote_code)
    if model.main_input_name != "input_ids":
        raise UserError(
            f"--against {original}: only models of text are run beside their original, and {type(model).__name__} "
            f"reads {model.main_input_name}; without --against names and shapes are verified"
        )
    dropped = _dropped(folder, run_stacks(model))
    expected = _logits(original, dropped, trust_remote_code)
    found = _logits(folder, [], trust_remote_code)
    error = (expected.double() - found.double()).abs().max().item() / expected.abs().max().item()
    tolerance = TOLERANCE.get(str(expected.dtype).removeprefix("torch."), HALF_TOLERANCE)
    if not error <= tolerance:
        raise StageFailure(
            f"{folder} does not compute what {original} does with layers {dropped} skipped: logits differ by "
            f"{error:.1e} of the largest, {tolerance:.0e} allowed"
        )
    return error


def _dropped(folder: Path, stacks: list[Stack]) -> list[int]:
    """The layers of the original that a folder left out, counted over these stacks of the original."""
    try:
        told = json.loads((folder / LAYER_MAP).read_text())
        maps = told["stacks"] if len(stacks) > 1 else {stacks[0].name: told}
        kept = [maps[stack.name]["new_to_old"] for stack in stacks]
    except (OSError, ValueError, KeyError, TypeError) as reason:
        raise UserError(f"{folder}/{LAYER_MAP} does not say which layers were kept: {reason}") from reason
    here = [layer in layers for stack, layers in zip(stacks, kept, strict=True) for layer in range(stack.depth)]
    return [layer for layer, stays in enumerate(here) if not stays]


def _logits(folder: Path, skip: list[int], trust_remote_code: bool) -> torch.Tensor:
    kind = model_class(read_config(folder, trust_remote_code)).__name__
    model: Any = load_model(folder, "auto", kind=kind, trust_remote_code=trust_remote_code)
    text = model.config.get_text_config()
    ids = torch.randint(text.vocab_size, (1, PROOF_TOKENS), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {})
    with torch.no_grad(), skipped(run_blocks(model), skip):
        logits: torch.Tensor = model(**inputs)[0]  # of a model without a head, states
    return logits
