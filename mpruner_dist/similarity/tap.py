"""Hooks on the blocks of a model: each layer's activations become small additive terms at once, and are dropped.

Shape suffixes: N samples, M of them whose states are kept, D features, L layers, G of them at once, S = L + 1 states.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpruner_dist.config import CollectConfig
from mpruner_dist.errors import StageFailure
from mpruner_dist.models.blocks import hidden_states_of, input_states_of
from mpruner_dist.similarity.estimators import make_estimator
from mpruner_dist.similarity.hsic import MIN_SAMPLES, layers_at_once
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
        self.seen = 0
        self.waiting: list[tuple[Tensor, Tensor]] = []
        self.states_MD: list[Tensor] = []
        # of a few layers each
        self.norms: list[Tensor] = []
        self.cosines: list[Tensor] = []
        self.energies: list[Tensor] = []
        self.sizes: list[Tensor] = []

    def observe(self, inputs_ND: Tensor, outputs_ND: Tensor) -> None:
        """Take the next layer: what its block was given for the samples, and what it made of it; both are kept a while.

        Nothing here waits for the device: whether the numbers are sound is asked once, by `terms`.

        Raises:
            StageFailure: more layers than there are.
        """
        if self.seen == self.layers:
            raise StageFailure(
                f"batch {self.batch}: more than {self.seen} blocks ran; a block that runs twice is no layer"
            )
        if self.seen == 0:
            self.clean_N = self.clean_N.to(outputs_ND.device)
            # as many samples as make the states of all layers a quarter of the Gram matrices
            self.kept = min(len(inputs_ND), max(MIN_SAMPLES, len(inputs_ND) ** 2 // (4 * inputs_ND.shape[1])))
            self.states_MD.append(inputs_ND[: self.kept].clone())
        self.seen += 1
        self.states_MD.append(outputs_ND[: self.kept].clone())
        if self.waiting and [one.shape for one in self.waiting[0]] != [inputs_ND.shape, outputs_ND.shape]:
            self._measure()
        self.waiting.append((inputs_ND, outputs_ND))
        numbers = max(outputs_ND.numel(), len(outputs_ND) ** 2)  # of the features, and of their Gram matrix
        if len(self.waiting) >= layers_at_once(numbers, outputs_ND.device):
            self._measure()

    def terms(self) -> dict[str, Tensor]:
        """All terms, float64, on the CPU.

        Raises:
            StageFailure: activations that are not finite, or the same for every sample; a pass that did not reach
                every block; too few samples left.
        """
        if self.waiting:
            self._measure()
        self._require_sound()
        chosen_N = self.clean_N.nonzero().squeeze(1)
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
        terms["cosine"] = torch.cat(self.cosines)[:, chosen_N].double().sum(1)
        terms["top_share"] = _top_shares(torch.cat(self.energies)[:, chosen_N])
        chosen_M = chosen_N[chosen_N < self.kept]
        terms["angle"] = summed_angles(self.states_MD, chosen_M)
        terms["angle_samples"] = torch.tensor(float(len(chosen_M)))
        return {name: value.detach().to("cpu", torch.float64) for name, value in terms.items()}

    def _measure(self) -> None:
        """The layers that wait, G of them, together."""
        inputs_GND, outputs_GND = (torch.stack(states).float() for states in zip(*self.waiting, strict=True))
        self.waiting = []
        norms_GN = outputs_GND.norm(dim=2)
        self.norms.append(norms_GN)
        clean_GN = self._clean(norms_GN)
        # else it is the first of a stage, and has no update of its input
        same_shape = inputs_GND.shape == outputs_GND.shape
        self.cosines.append(_cosines(inputs_GND, outputs_GND, norms_GN) if same_shape else torch.zeros_like(norms_GN))
        states_GND = self._scaled(outputs_GND, norms_GN)
        self.energies.append(_energies(states_GND, clean_GN))
        self.sizes.append(states_GND.norm(dim=(1, 2)))
        self.streams["states"].keep(states_GND)
        updates_GND = outputs_GND - inputs_GND if same_shape else outputs_GND
        self.streams["updates"].keep(self._scaled(updates_GND, updates_GND.norm(dim=2)))

    def _clean(self, norms_GN: Tensor) -> Tensor:
        """Which samples are no outliers in any layer up to each of these, bool; `clean_N` is then that of the last."""
        if self.config.outlier_norm is None:
            return self.clean_N.expand_as(norms_GN)
        usual_GN = norms_GN <= self.config.outlier_norm * norms_GN.median(dim=1, keepdim=True).values
        clean_GN = self.clean_N & usual_GN.cumprod(0).bool()
        self.clean_N = clean_GN[-1]
        return clean_GN

    def _scaled(self, vectors_GND: Tensor, norms_GN: Tensor) -> Tensor:
        if not self.config.normalize:
            return vectors_GND
        rms_GN = norms_GN / vectors_GND.shape[2] ** 0.5
        scaled_GND: Tensor = vectors_GND / rms_GN.clamp_min(torch.finfo(torch.float32).tiny)[:, :, None]
        return scaled_GND

    def _require_sound(self) -> None:
        if self.seen != self.layers:
            raise StageFailure(f"batch {self.batch}: {self.seen} blocks ran, the model has {self.layers}")
        not_finite_LN = ~torch.cat(self.norms).isfinite()
        for layer, share in enumerate(not_finite_LN.float().mean(1).tolist()):
            if share:
                raise StageFailure(
                    f"batch {self.batch}: {share:.1%} of the sampled activations of layer {self.first + layer} are not "
                    "finite; nothing of this batch was saved. Try model.dtype float32 or bfloat16, and check the "
                    "checkpoint"
                )
        spread_L, squares_L = torch.cat(self.energies).sum(1), torch.cat(self.sizes).square()
        for layer, varies in enumerate((spread_L > CONSTANT * squares_L).tolist()):
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


def summed_angles(states_MD: list[Tensor], chosen_M: Tensor) -> Tensor:
    """Angle / pi between every two states, summed over the chosen samples, float64 [S, S]; 1 between unequal widths."""
    total_SS = torch.full((len(states_MD), len(states_MD)), float(len(chosen_M)), dtype=torch.float64)
    for width in {state_MD.shape[1] for state_MD in states_MD}:
        alike = [index for index, state_MD in enumerate(states_MD) if state_MD.shape[1] == width]
        total_SS[np.ix_(alike, alike)] = _angles_of_equal_width([states_MD[index] for index in alike], chosen_M)
    return total_SS.fill_diagonal_(0.0)


def _angles_of_equal_width(states_MD: list[Tensor], chosen_M: Tensor) -> Tensor:
    """A few samples at a time: all at once the float64 copies of the states would be as large as the Gram matrices."""
    total_SS = torch.zeros(len(states_MD), len(states_MD), dtype=torch.float64)
    stacked_SMD = torch.stack(states_MD)
    for some in torch.split(chosen_M, ANGLES_AT_ONCE):
        part_MSD = stacked_SMD[:, some].transpose(0, 1).double()
        unit_MSD = torch.nn.functional.normalize(part_MSD, dim=-1)
        cosine_MSS = (unit_MSD @ unit_MSD.transpose(1, 2)).clamp(-1.0, 1.0)
        total_SS += torch.arccos(cosine_MSS).sum(0).cpu() / torch.pi
    return total_SS


def _cosines(one_GND: Tensor, other_GND: Tensor, other_norms_GN: Tensor) -> Tensor:
    """Of each sample's two vectors [G, N]; 0 where one of them is."""
    products_GN = one_GND.norm(dim=2) * other_norms_GN
    cosines_GN: Tensor = (one_GND * other_GND).sum(2) / products_GN.clamp_min(torch.finfo(torch.float32).tiny)
    return cosines_GN


def _energies(states_GND: Tensor, clean_GN: Tensor) -> Tensor:
    """Squared distance [G, N] of each sample from the mean of the clean ones: their share of the Gram's trace."""
    weights_GN = clean_GN.float()
    mean_G1D = (weights_GN[:, None] @ states_GND) / weights_GN.sum(1)[:, None, None]
    energies_GN: Tensor = (states_GND - mean_G1D).norm(dim=2).square()
    return energies_GN


def _top_shares(energies_LN: Tensor) -> Tensor:
    """Share [L] of each row's sum that the largest one in TOP_PART hold."""
    energies_LN = energies_LN.double()
    largest = energies_LN.topk(-(-energies_LN.shape[1] // TOP_PART), dim=1).values
    return largest.sum(1) / energies_LN.sum(1)
