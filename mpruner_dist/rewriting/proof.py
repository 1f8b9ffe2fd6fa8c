"""A rewritten checkpoint counts only when proven: every name and shape is the one that its configuration asks for."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mpruner_dist.checkpoints.folder import INDEX_NAME, SINGLE_NAME, CheckpointFolder, read_checkpoint
from mpruner_dist.errors import StageFailure, UserError
from mpruner_dist.models.blocks import num_layers, skipped
from mpruner_dist.models.loading import key_problems, load_model, read_config
from mpruner_dist.models.stacks import only_blocks
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
    """Run a pruned causal language model beside its original with the layers skipped, one after the other in memory.

    Returns:
        The largest difference of a logit, as a share of the largest.

    Raises:
        UserError: the folder does not say which layers of a single stack it kept.
        StageFailure: it is too large.
    """
    try:
        kept = json.loads((folder / LAYER_MAP).read_text())["new_to_old"]
    except (OSError, ValueError, KeyError) as reason:
        raise UserError(f"{folder}/{LAYER_MAP} does not say which layers were kept: {reason}") from reason
    depth = num_layers(read_config(original, trust_remote_code))
    dropped = [layer for layer in range(depth) if layer not in kept]
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


def _logits(folder: Path, skip: list[int], trust_remote_code: bool) -> torch.Tensor:
    model: Any = load_model(folder, "auto", trust_remote_code=trust_remote_code)
    text = model.config.get_text_config()
    ids = torch.randint(text.vocab_size, (2, PROOF_TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), skipped(only_blocks(model), skip):
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits
