"""A model with its weights inside a DeepSpeed engine, on this worker's device."""

from pathlib import Path
from typing import Any

from mpruner_dist.cluster.engine import make_engine
from mpruner_dist.cluster.settings import Settings, zero_stage
from mpruner_dist.config import ModelConfig
from mpruner_dist.models.loading import load_model


def load_for(settings: Settings, folder: Path, config: ModelConfig, *, head: bool = True) -> Any:
    """The model, its weights divided among the workers if the settings ask for ZeRO stage 3."""
    return load_model(
        folder,
        config.dtype,
        head=head,
        trust_remote_code=config.trust_remote_code,
        partition=settings if zero_stage(settings) == 3 else None,
    )


def inference_engine(settings: Settings, folder: Path, config: ModelConfig, *, head: bool = True) -> Any:
    """An engine that only runs forward."""
    engine = make_engine(load_for(settings, folder, config, head=head), settings)
    engine.eval()
    return engine
