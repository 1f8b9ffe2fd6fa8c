"""A rewritten checkpoint counts only when proven: it loads, and computes what the original without the layers does."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mpruner_dist.checkpoints.folder import CheckpointFolder, read_checkpoint
from mpruner_dist.errors import StageFailure, UserError
from mpruner_dist.models.blocks import find_blocks, num_layers, skipped
from mpruner_dist.models.loading import key_problems, load_model
from mpruner_dist.plan import Plan

TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
HALF_TOLERANCE = 2e-2  # bfloat16 and float16, as a share of the largest logit
PROOF_TOKENS = 32


@dataclass(frozen=True)
class Claim:
    """`target` is `source` without the layers that the plan drops."""

    source: Path
    target: Path
    plan: Plan
    trust_remote_code: bool = False


def prove(claim: Claim) -> float:
    """Check names, shapes and one forward pass; return the largest difference of a logit, as a share of the largest.

    Raises:
        StageFailure: what differs.
    """
    read_checkpoint(claim.target)
    # what the original already had too much, such as buffers that older versions saved, may stay
    known = key_problems(claim.source, claim.trust_remote_code)
    problems = [p for p in key_problems(claim.target, claim.trust_remote_code) if p not in known]
    if problems:
        raise StageFailure(
            f"the rewritten checkpoint {claim.target} does not fit its configuration: {'; '.join(problems[:3])}"
        )
    return _compare_logits(claim)


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


def _compare_logits(claim: Claim) -> float:
    """One model at a time is in memory."""
    original = _logits(claim.source, claim.plan.dropped, claim.trust_remote_code)
    pruned = _logits(claim.target, [], claim.trust_remote_code)
    scale = original.abs().max().item()
    error = (original.double() - pruned.double()).abs().max().item() / scale
    tolerance = TOLERANCE.get(str(original.dtype).removeprefix("torch."), HALF_TOLERANCE)
    if not error <= tolerance:
        raise StageFailure(
            f"the rewritten checkpoint {claim.target} does not compute what {claim.source} does with layers "
            f"{claim.plan.dropped} skipped: logits differ by {error:.1e} of the largest, {tolerance:.0e} allowed. Its "
            "family needs more than renaming; nothing was put in place"
        )
    return error


def _logits(folder: Path, skip: list[int], trust_remote_code: bool) -> torch.Tensor:
    model = load_model(folder, "auto", trust_remote_code=trust_remote_code)
    config: Any = model.config
    ids = torch.randint(config.vocab_size, (2, PROOF_TOKENS), generator=torch.Generator().manual_seed(0))
    _, blocks = find_blocks(model, num_layers(config))
    with torch.no_grad(), skipped(blocks, skip):
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits
