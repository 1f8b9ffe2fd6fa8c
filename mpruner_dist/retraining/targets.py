"""What of a model can be trained alone: which projections get adapters, by the names in `retrain.lora.targets`."""

import difflib
from typing import Any

from mpruner_dist.config import LoraConfig, RetrainConfig
from mpruner_dist.errors import UserError
from mpruner_dist.models.blocks import normalisations, projections
from mpruner_dist.models.loading import empty_model
from mpruner_dist.models.stacks import run_stacks


def require_targets(config: RetrainConfig, model_config: Any, trust_remote_code: bool = False) -> None:
    """Refuse, before anything is done, what the unpruned model cannot: targets that its layers do not have, and parts.

    Args:
        config: the section `retrain`; where all of the model is trained, its batch normalisation is looked at only.
        model_config: of the unpruned model.
        trust_remote_code: run code that lies in its folder.

    Raises:
        UserError: with the nearest names and all others; or the model has batch normalisation, of which no part can be
            trained alone, and no image alone.
    """
    model = empty_model(model_config, trust_remote_code)
    if config.lora is not None or config.trainable != "all":
        require_no_running_means(model)
    if config.micro_batch_size == 1 and normalisations(model):
        raise UserError(
            "retrain.micro_batch_size 1: the model has batch normalisation, which normalises each micro-batch alone; "
            "set it to 2 at least, better to 16 or more"
        )
    if config.lora is not None and config.lora.targets != "all-linear":
        target_names(model, config.lora, None)


def require_no_running_means(model: Any) -> None:
    """Refuse to train a part of a model whose other parts do not hold still.

    Raises:
        UserError: it has batch normalisation.
    """
    if normalisations(model):
        raise UserError(
            f"{type(model).__name__} has batch normalisation, which changes in every forward pass: set "
            "retrain.trainable all, and leave retrain.lora out"
        )


def target_names(model: Any, config: LoraConfig, layers: list[int] | None) -> list[str]:
    """Full names of the projections that get adapters.

    Args:
        model: its parameters on any device.
        config: with the targets.
        layers: the only ones that get adapters; None for all.

    Raises:
        UserError: targets that the layers do not have, with the nearest names and all others.
    """
    blocks = [
        (f"{stack.name}.{number}", block)
        for stack in run_stacks(model)
        for number, block in enumerate(model.get_submodule(stack.name))
    ]
    found = [
        (name, f"{prefix}.{name}")
        for layer, (prefix, block) in enumerate(blocks)
        if layers is None or layer in layers
        for name in projections(block)
    ]
    if config.targets == "all-linear":
        return [full for _, full in found]
    known = sorted({name for name, _ in found})
    unknown = [target for target in config.targets if not any(_ends_with(name, target) for name in known)]
    if unknown:
        told = "".join(f"no layer has a projection {target!r}{_nearest(target, known)}; " for target in unknown)
        raise UserError(f"retrain.lora.targets: {told}there are {', '.join(known)}")
    return [full for name, full in found if any(_ends_with(name, target) for target in config.targets)]


def _nearest(target: str, known: list[str]) -> str:
    """The names most like it, in as many parts as it has."""
    parts = target.count(".") + 1
    names = sorted({".".join(name.split(".")[-parts:]) for name in known})
    near = difflib.get_close_matches(target, names, n=3)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def _ends_with(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")
