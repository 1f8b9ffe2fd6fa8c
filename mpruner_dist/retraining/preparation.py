"""The loaded model made ready to train: what is frozen, adapters, activations kept or computed again."""

from typing import Any

import torch

from mpruner_dist.checkpoints.export import NOT_ASKED_FOR, Weight, match_names
from mpruner_dist.checkpoints.folder import CheckpointFolder
from mpruner_dist.cluster.worker import Worker
from mpruner_dist.config import RetrainConfig
from mpruner_dist.errors import UserError
from mpruner_dist.models.blocks import normalisations
from mpruner_dist.models.naming import model_names
from mpruner_dist.models.stacks import run_blocks
from mpruner_dist.retraining.adapters import attach_adapters
from mpruner_dist.retraining.targets import require_no_running_means


def prepare_model(
    model: Any, pruned: CheckpointFolder, config: RetrainConfig, layers: list[int] | None
) -> dict[str, Weight]:
    """Freeze, attach adapters, switch activation checkpointing on.

    Args:
        model: loaded from `pruned`, its parameters partitioned or not.
        pruned: the folder.
        config: what to do.
        layers: the only ones to train; None for all of the model.

    Returns:
        How each tensor of the folder gets its new value.

    Raises:
        UserError: the model cannot do what is asked for.
        StageFailure: a tensor that could not be written back.
    """
    for module in model.modules():
        if hasattr(module, "create_weight"):  # positions that Marian and Pegasus compute; transformers forgets it
            module.requires_grad_(False)
    # what is merged or split on the way cannot be written back
    renamed = {name: key for name, (key, merged) in model_names(model, pruned.tensors).items() if merged is None}
    state = model.state_dict().keys()
    unasked = [name for name, key in renamed.items() if key not in state]
    parameters = match_names(model, pruned, str(model.base_model_prefix), renamed, unasked)
    if layers is not None:
        model.requires_grad_(False)
        blocks = run_blocks(model)
        for layer in layers:
            blocks[layer].requires_grad_(True)
    if layers is not None or config.lora is not None:
        require_no_running_means(model)
    weights = {name: Weight(parameter) for name, parameter in parameters.items()}
    if config.lora is not None:
        adapters = attach_adapters(model, config.lora, layers, config.seed)
        weights = {name: adapters.get(id(parameter), Weight(parameter)) for name, parameter in parameters.items()}
    if config.activation_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise UserError(f"{type(model).__name__} has no activation checkpointing: leave it out of retrain")
        # the other kind would need inputs with gradients, which frozen embeddings do not give
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    moving = {id(buffer) for buffer in running_means(model).values()}
    return {
        name: weight
        if weight.parameter.requires_grad or id(weight.parameter) in moving
        else Weight(weight.parameter, True, weight.beside, weight.added)
        for name, weight in weights.items()
    } | dict.fromkeys(unasked, NOT_ASKED_FOR)


def running_means(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """By name, the buffers of all batch normalisations: means, variances, and how many batches they have seen."""
    moving = {id(buffer) for module in normalisations(model) for buffer in module.buffers()}
    return {name: buffer for name, buffer in model.named_buffers() if id(buffer) in moving}


def share_normalisations(worker: Worker, model: torch.nn.Module) -> None:
    """Make the running means and variances of all workers their mean, so that each has the same."""
    for buffer in running_means(model).values():
        if buffer.is_floating_point():
            worker.sum_over_workers(buffer).div_(worker.world_size)


def trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """What the optimizer is given."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
