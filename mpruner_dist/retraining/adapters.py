"""LoRA: low-rank adapters beside the projections of the layers, and what they add to the weights."""

from functools import partial
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer

from mpruner_dist.checkpoints.export import Weight
from mpruner_dist.config import LoraConfig
from mpruner_dist.errors import UserError
from mpruner_dist.models.blocks import projections
from mpruner_dist.models.stacks import run_stacks

NAME = "default"


def attach_adapters(model: Any, config: LoraConfig, layers: list[int] | None, seed: int) -> dict[int, Weight]:
    """Put adapters into a loaded model and freeze all else; the same on every worker.

    Args:
        model: its parameters partitioned or not; the adapters are whole, and partitioned when an engine is made.
        config: rank, scale, targets.
        layers: the only ones that get adapters; None for all.
        seed: of the adapters' first values.

    Returns:
        For the id of each weight with an adapter, how its merged value is made.

    Raises:
        UserError: targets that the layers do not have.
    """
    names = _targets(model, config, layers)
    torch.manual_seed(seed)
    options = {"r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout}
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=names, **options), model, NAME)
    merged = {}
    for module in model.modules():
        if isinstance(module, LoraLayer):
            base = module.get_base_layer().weight
            pair = (module.lora_A[NAME].weight, module.lora_B[NAME].weight)
            for half in pair:
                half.data = half.data.to(base.dtype)  # under ZeRO-3 DeepSpeed refuses a mixture
            merged[id(base)] = Weight(base, beside=pair, added=partial(module.get_delta_weight, NAME))
    return merged


def _targets(model: Any, config: LoraConfig, layers: list[int] | None) -> list[str]:
    """Full names of the projections that get adapters."""
    blocks = [
        (f"{stack.name}.{number}", block)
        for stack in run_stacks(model)
        for number, block in enumerate(model.get_submodule(stack.name))
    ]
    found = [
        (f"{layer}.{name}", f"{prefix}.{name}")
        for layer, (prefix, block) in enumerate(blocks)
        if layers is None or layer in layers
        for name in projections(block)
    ]
    if config.targets == "all-linear":
        return [full for _, full in found]
    known = sorted({name.partition(".")[2] for name, _ in found})
    for target in config.targets:
        if not any(_ends_with(name, target) for name in known):
            raise UserError(f"retrain.lora.targets: no layer has a projection {target!r}; there are {', '.join(known)}")
    return [full for name, full in found if any(_ends_with(name, target) for target in config.targets)]


def _ends_with(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")
