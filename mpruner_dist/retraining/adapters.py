"""LoRA: low-rank adapters beside the projections of the layers, and what they add to the weights."""

from functools import partial
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer

from mpruner_dist.checkpoints.export import Weight
from mpruner_dist.config import LoraConfig
from mpruner_dist.retraining.targets import target_names

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
    names = target_names(model, config, layers)
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
