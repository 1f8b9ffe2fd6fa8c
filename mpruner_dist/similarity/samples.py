"""Which tokens of a batch are compared, and the Gram matrices of their vectors in every layer.

Shape suffixes: B sequences, T tokens, M candidates, N samples, D features, L layers.
"""

import hashlib

import torch
from torch import Tensor

from mpruner_dist.config import CollectConfig
from mpruner_dist.errors import StageFailure, UserError
from mpruner_dist.models.blocks import hidden_states_of
from mpruner_dist.similarity.hsic import MIN_SAMPLES, gram, hsic_of_pairs

SPARE = 4  # a quarter more candidates than samples, to replace those that turn out to be outliers


def draw_candidates(mask_BT: Tensor, config: CollectConfig, batch: int) -> Tensor:
    """Positions [M] in the flattened batch, in random order: text only, the first tokens of a sequence left out.

    The draw depends on the seed and the batch id alone, never on the worker or the device.

    Raises:
        UserError: fewer positions than samples are asked for.
    """
    eligible_BT = mask_BT.bool().clone()
    eligible_BT[:, : config.skip_tokens] = False
    positions = eligible_BT.flatten().nonzero().squeeze(1)
    if len(positions) < config.samples:
        raise UserError(
            f"calibration batch {batch} has {len(positions)} tokens to draw from, collect.samples is {config.samples}: "
            "lower it, or raise collect.batch_size"
        )
    seed = int.from_bytes(hashlib.sha256(f"{config.seed}/{batch}".encode()).digest()[:8], "little") >> 1
    order = torch.randperm(len(positions), generator=torch.Generator().manual_seed(seed))
    return positions[order[: config.samples + config.samples // SPARE]]


class LayerTap:
    """Hooks on the blocks of a decoder; keeps one Gram matrix [M, M] a layer, and drops the activations at once."""

    def __init__(self, blocks: torch.nn.ModuleList, config: CollectConfig) -> None:
        self.config = config
        self.num_layers = len(blocks)
        self.hooks = [block.register_forward_hook(self._tap(layer)) for layer, block in enumerate(blocks)]
        self.begin(batch=-1, candidates=None)

    def begin(self, batch: int, candidates: Tensor | None) -> None:
        """Get ready for one forward pass; without candidates, nothing is kept."""
        self.batch, self.candidates = batch, candidates
        self.grams: list[Tensor] = []
        self.clean = torch.ones(0) if candidates is None else torch.ones(len(candidates), dtype=torch.bool)

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self.hooks:
            hook.remove()

    def hsic(self) -> tuple[Tensor, int]:
        """Unbiased HSIC [L, L], float64, on the CPU, and the number of samples it was made of.

        Raises:
            StageFailure: the pass did not reach every block once, or too few tokens are left.
        """
        if len(self.grams) != self.num_layers:
            raise StageFailure(f"batch {self.batch}: {len(self.grams)} blocks ran, the model has {self.num_layers}")
        kept = self.clean.nonzero().squeeze(1)[: self.config.samples]
        if len(kept) < MIN_SAMPLES:
            raise StageFailure(
                f"batch {self.batch}: {len(kept)} tokens are left after the norm outliers, {MIN_SAMPLES} needed: raise "
                "collect.outlier_norm or collect.samples"
            )
        chosen = kept.to(self.grams[0].device)
        gram_LNN = torch.stack([gram_MM[chosen][:, chosen] for gram_MM in self.grams])
        return hsic_of_pairs(gram_LNN).cpu(), len(kept)

    def _tap(self, layer: int):  # type: ignore[no-untyped-def]
        def hook(_module: torch.nn.Module, _inputs: object, output: object) -> None:
            if self.candidates is not None:
                self._keep(layer, hidden_states_of(output))

        return hook

    def _keep(self, layer: int, hidden_BTD: Tensor) -> None:
        vectors_MD = hidden_BTD.flatten(0, 1)[self.candidates.to(hidden_BTD.device)].float()  # type: ignore[union-attr]
        norms_M = vectors_MD.norm(dim=1)
        finite_M = torch.isfinite(norms_M)
        if not finite_M.all():
            share = 1 - finite_M.float().mean().item()
            raise StageFailure(
                f"batch {self.batch}: {share:.1%} of the sampled activations of layer {layer} are not finite; nothing "
                "of this batch was saved. Try model.dtype float32 or bfloat16, and check the checkpoint"
            )
        if self.config.outlier_norm is not None:
            self.clean &= (norms_M <= self.config.outlier_norm * norms_M.median()).cpu()
        if self.config.normalize:
            rms_M = norms_M / vectors_MD.shape[1] ** 0.5
            vectors_MD = vectors_MD / rms_M.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
        self.grams.append(gram(vectors_MD))
