"""A model with its weights inside a DeepSpeed engine, on this worker's device."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpruner_dist.cluster.engine import make_engine
from mpruner_dist.cluster.settings import Settings, zero_stage
from mpruner_dist.config import ModelConfig
from mpruner_dist.models.loading import load_model
from mpruner_dist.models.streaming import CannotStream, stream_model


def load_for(
    settings: Settings, folder: Path, config: ModelConfig, log: Callable[[str], None], *, head: bool = True
) -> Any:
    """The model, its weights divided among the workers if the settings ask for ZeRO stage 3.

    Raises:
        UserError: the folder's tensors are not those of the model.
    """
    options: dict[str, Any] = {"head": head, "trust_remote_code": config.trust_remote_code}
    if zero_stage(settings) != 3:
        return load_model(folder, config.dtype, **options)
    try:
        return stream_model(folder, config.dtype, settings, **options)
    except CannotStream as reason:
        log(f"{folder} is loaded by transformers, slowly and with more memory: {reason}")
        return load_model(folder, config.dtype, partition=settings, **options)


def inference_engine(
    settings: Settings, folder: Path, config: ModelConfig, log: Callable[[str], None], *, head: bool = True
) -> Any:
    """An engine that only runs forward; `log` is told how the model was loaded, if not by the usual way."""
    engine = make_engine(load_for(settings, folder, config, log, head=head), settings)
    engine.eval()
    return engine
