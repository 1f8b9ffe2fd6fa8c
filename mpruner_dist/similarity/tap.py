"""Hooks on the blocks of a model: each layer's activations become small additive terms at once, and are dropped.

Shape suffixes: N samples, M of them whose states are kept, D features, L layers, S = L + 1 states.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpruner_dist.config import CollectConfig
from mpruner_dist.errors import StageFailure
from mpruner_dist.models.blocks import hidden_states_of, input_states_of
from mpruner_dist.similarity.estimators import make_estimator
from mpruner_dist.similarity.hsic import MIN_SAMPLES
from mpruner_dist.similarity.samples import Samples

CONSTANT = 1e-12  # of the mean square: below it float32 has only noise left
TOP_PART = 100  # one sample in a hundred, at least one
ANGLES_AT_ONCE = 16


class BatchStatistics:
    """Everything that is measured on one batch, layer by layer: memory for L N N floats, whatever the data's size."""

    def __init__(self, batch: int, samples: Samples, config: CollectConfig, layers: int, first: int = 0) -> None:
        """`first`: what the run calls the first of these layers, for messages."""
        self.batch, self.samples, self.config, self.layers, self.first = batch, samples, config, layers, first
        self.streams = {stream: make_estimator(config.estimator, layers) for stream in ("states", "updates")}
        self.clean_N = torch.ones(len(samples.positions_N), dtype=torch.bool)
        self.cosines_N: list[Tensor] = []
        self.energies_N: list[Tensor] = []
        self.states_MD: list[Tensor] = []
        self.not_finite: list[Tensor] = []
        self.varies: list[Tensor] = []

    def observe(self, inputs_ND: Tensor, outputs_ND: Tensor) -> None:
        """Take the next layer: what its block was given for the samples, and what it made of it.

        Nothing here waits for the device: whether the numbers are sound is asked once, by `terms`.

        Raises:
            StageFailure: more layers than there are.
        """
        layer = len(self.cosines_N)
        if layer == self.layers:
            raise StageFailure(f"batch {self.batch}: more than {layer} blocks ran; a block that runs twice is no layer")
        if layer == 0:
            # as many samples as make the states of all layers a quarter of the Gram matrices
            self.kept = min(len(inputs_ND), max(MIN_SAMPLES, len(inputs_ND) ** 2 // (4 * inputs_ND.shape[1])))
            self.states_MD.append(inputs_ND[: self.kept].clone())
        self.states_MD.append(outputs_ND[: self.kept].clone())
        inputs_ND, outputs_ND = inputs_ND.float(), outputs_ND.float()
        norms_N = outputs_ND.norm(dim=1)
        self.not_finite.append(1 - torch.isfinite(norms_N).float().mean())
        if self.config.outlier_norm is not None:
            self.clean_N = self.clean_N.to(norms_N.device) & (norms_N <= self.config.outlier_norm * norms_N.median())
        same_shape = (
            inputs_ND.shape == outputs_ND.shape
        )  # else it is the first of a stage, and has no update of its input
        cosine_N = torch.cosine_similarity(inputs_ND, outputs_ND, dim=1) if same_shape else torch.zeros_like(norms_N)
        self.cosines_N.append(cosine_N)
        states_ND = self._scaled(outputs_ND)
        self.energies_N.append(self._energies(states_ND))
        self.varies.append(self.energies_N[-1].mean() > CONSTANT * states_ND.square().sum(1).mean())
        self.streams["states"].keep(states_ND)
        self.streams["updates"].keep(self._scaled(outputs_ND - inputs_ND if same_shape else outputs_ND))

    def terms(self) -> dict[str, Tensor]:
        """All terms, float64, on the CPU.

        Raises:
            StageFailure: activations that are not finite, or the same for every sample; a pass that did not reach
                every block; too few samples left.
        """
        self._require_sound()
        clean_N = self.clean_N.to(self.cosines_N[0].device)
        chosen_N = clean_N.nonzero().squeeze(1)
        if len(chosen_N) < MIN_SAMPLES:
            raise StageFailure(
                f"batch {self.batch}: {len(chosen_N)} samples are left after the norm outliers, {MIN_SAMPLES} needed: "
                "raise collect.outlier_norm or collect.samples"
            )
        groups_N = self.samples.groups_N.to(chosen_N.device)[chosen_N]
        orders_RN = self.samples.orders(len(chosen_N)).to(chosen_N.device)
        terms = {
            f"{stream}.{name}": value
            for stream, estimator in self.streams.items()
            for name, value in estimator.terms(chosen_N, groups_N, orders_RN).items()
        }
        terms["samples"] = torch.tensor(float(len(chosen_N)))
        terms["batches_counted"] = torch.tensor(1.0)
        terms["cosine"] = torch.stack([cosine_N[chosen_N].double().sum() for cosine_N in self.cosines_N])
        terms["top_share"] = torch.stack([_top_share(energy_N[chosen_N]) for energy_N in self.energies_N])
        clean_states = [states_MD[clean_N[: self.kept]] for states_MD in self.states_MD]
        terms["angle"] = summed_angles(clean_states)
        terms["angle_samples"] = torch.tensor(float(len(clean_states[0])))
        return {name: value.detach().to("cpu", torch.float64) for name, value in terms.items()}

    def _scaled(self, vectors_ND: Tensor) -> Tensor:
        if not self.config.normalize:
            return vectors_ND
        rms_N1 = vectors_ND.norm(dim=1, keepdim=True) / vectors_ND.shape[1] ** 0.5
        scaled_ND: Tensor = vectors_ND / rms_N1.clamp_min(torch.finfo(torch.float32).tiny)
        return scaled_ND

    def _energies(self, states_ND: Tensor) -> Tensor:
        """Squared distance [N] of each sample from the mean of the clean ones: their share of the Gram's trace."""
        weights_N = self.clean_N.to(states_ND.device, torch.float32)
        return (states_ND - weights_N @ states_ND / weights_N.sum()).square().sum(1)

    def _require_sound(self) -> None:
        if len(self.cosines_N) != self.layers:
            raise StageFailure(f"batch {self.batch}: {len(self.cosines_N)} blocks ran, the model has {self.layers}")
        for layer, share in enumerate(torch.stack(self.not_finite).tolist()):
            if share:
                raise StageFailure(
                    f"batch {self.batch}: {share:.1%} of the sampled activations of layer {self.first + layer} are not "
                    "finite; nothing of this batch was saved. Try model.dtype float32 or bfloat16, and check the "
                    "checkpoint"
                )
        for layer, varies in enumerate(torch.stack(self.varies).tolist()):
            if not varies:
                raise StageFailure(
                    f"batch {self.batch}: the activations of layer {self.first + layer} are the same for every sample, "
                    "its CKA is undefined: check the checkpoint and the calibration text"
                )


class LayerTap:
    """Hooks on a stack of blocks, which feed the statistics of the batches that lie in one forward pass."""

    def __init__(self, blocks: torch.nn.ModuleList, first: int = 0) -> None:
        """`first`: what the run calls the first of these blocks."""
        self.layers, self.first = len(blocks), first
        self.batches: list[BatchStatistics] = []
        self.inputs: list[Tensor] = []
        self.hooks = [block.register_forward_pre_hook(self._before, with_kwargs=True) for block in blocks]
        self.hooks += [block.register_forward_hook(self._after) for block in blocks]

    def begin(self, batches: list[BatchStatistics]) -> None:
        """Get ready for a forward pass over these batches' sequences, one batch after another; with none, rest."""
        self.batches = batches

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self.hooks:
            hook.remove()

    def _before(self, _module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # taken before the block runs: some add to their input in place
        self.inputs = self._taken(input_states_of(args, kwargs)) if self.batches else []

    def _after(self, _module: torch.nn.Module, _args: object, output: object) -> None:
        if not self.batches:
            return
        outputs = self._taken(hidden_states_of(output))
        for batch, inputs_ND, outputs_ND in zip(self.batches, self.inputs, outputs, strict=True):
            batch.observe(inputs_ND, outputs_ND)

    def _taken(self, hidden: Tensor) -> list[Tensor]:
        sizes = [len(batch.samples.eligible_BT) for batch in self.batches]
        width = self.batches[0].samples.eligible_BT.shape[1]
        if self.batches[0].samples.unit in ("token", "sequence") and hidden.shape[1] != width:
            raise StageFailure(
                f"a block has states at {hidden.shape[1]} positions of texts of {width} tokens: this family pads or "
                "cuts them inside, and which position is which token is not known"
            )
        return [batch.samples.take(part) for batch, part in zip(self.batches, torch.split(hidden, sizes), strict=True)]


def summed_angles(states_MD: list[Tensor]) -> Tensor:
    """Angle / pi between every two states, summed over samples, float64 [S, S]; 1 between those of different widths."""
    total_SS = torch.full((len(states_MD), len(states_MD)), float(len(states_MD[0])), dtype=torch.float64)
    for width in {state_MD.shape[1] for state_MD in states_MD}:
        alike = [index for index, state_MD in enumerate(states_MD) if state_MD.shape[1] == width]
        total_SS[np.ix_(alike, alike)] = _angles_of_equal_width([states_MD[index] for index in alike])
    return total_SS.fill_diagonal_(0.0)


def _angles_of_equal_width(states_MD: list[Tensor]) -> Tensor:
    """A few samples at a time: all at once the float32 copies of the states would be as large as the Gram matrices."""
    total_SS = torch.zeros(len(states_MD), len(states_MD), dtype=torch.float64)
    for start in range(0, len(states_MD[0]), ANGLES_AT_ONCE):
        part_MSD = torch.stack([state_MD[start : start + ANGLES_AT_ONCE].double() for state_MD in states_MD], 1)
        unit_MSD = torch.nn.functional.normalize(part_MSD, dim=-1)
        cosine_MSS = (unit_MSD @ unit_MSD.transpose(1, 2)).clamp(-1.0, 1.0)
        total_SS += torch.arccos(cosine_MSS).sum(0).cpu() / torch.pi
    return total_SS


def _top_share(energies_N: Tensor) -> Tensor:
    """Share of the sum that the largest one in TOP_PART hold."""
    largest = energies_N.double().topk(-(-len(energies_N) // TOP_PART)).values
    return largest.sum() / energies_N.double().sum()
