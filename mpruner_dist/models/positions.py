"""How long a text may be: families with learned positions have a table of them."""

import re
from typing import Any

import torch

from mpruner_dist.config import Config
from mpruner_dist.config.task import FACTS
from mpruner_dist.errors import UserError
from mpruner_dist.models.loading import empty_model

TABLE = re.compile(r"(^|\.)(wpe|position_embeddings|embed_positions)$")


def require_positions(model_config: Any, config: Config) -> None:
    """Refuse texts longer than a table of learned positions: on a GPU that would end the process.

    Args:
        model_config: of the model.
        config: of the run.

    Raises:
        UserError: what is too long, and how long it may be.
    """
    if FACTS[config.model.task].reads != "text":
        return
    model, data = empty_model(model_config, config.model.trust_remote_code), config.data
    for name, module in model.named_modules():
        if not TABLE.search(name) or not isinstance(module, torch.nn.Embedding):
            continue
        # RoBERTa's begin behind the number of the padding, OPT's and BART's at 2
        before = int(getattr(module, "offset", 0)) or (0 if module.padding_idx is None else module.padding_idx + 1)
        room = module.num_embeddings - before
        says = model.config.is_encoder_decoder and "decoder" in name.split(".")
        key = "target_size" if says and data.target_size else "block_size"
        asked = getattr(data, key)
        if asked > room:
            raise UserError(f"data.{key} {asked}: the model has learned positions for {room} tokens ({name}): lower it")
