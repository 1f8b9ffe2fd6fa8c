"""A model with its weights inside a DeepSpeed engine, on this worker's device."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mpruner_dist.checkpoints.folder import read_checkpoint
from mpruner_dist.cluster.engine import make_engine
from mpruner_dist.cluster.settings import Settings, given_stage, inference_settings, zero_stage
from mpruner_dist.cluster.shape import choose_shape, free_memory
from mpruner_dist.cluster.worker import Worker
from mpruner_dist.config import Config, ModelConfig
from mpruner_dist.config.task import FACTS
from mpruner_dist.models.loading import load_model
from mpruner_dist.models.streaming import CannotStream, stream_model
from mpruner_dist.tasks import task_of


def logits_bytes(config: Config, model_config: Any) -> int:
    """Of a batch of evaluation: in the weights' number type and twice in float32, for the loss; of classes, none.

    Args:
        config: of the run.
        model_config: transformers' own.
    """
    if FACTS[config.model.task].unit != "token":
        return 0
    most = getattr(model_config, "max_target_positions", config.data.block_size)  # of speech
    words = (config.data.target_size or most) * model_config.get_text_config().vocab_size
    return int(config.evaluate.batch_size * words * (getattr(torch, config.model.dtype).itemsize + 8))


def forward_settings(worker: Worker, given: Settings, config: Config, folder: Path, logits: int = 0) -> Settings:
    """The DeepSpeed configuration of forward passes of a model, in a shape that fits where nobody asked for one.

    `logits` are bytes that each worker needs beside the weights.

    Raises:
        StageFailure: none fits.
    """
    stage = given_stage(given, config.cluster.zero_stage)
    if stage != "auto":
        return inference_settings(given, stage, config.model.dtype)
    free, beside = free_memory(worker.device, worker.local_workers)
    least = worker.least_over_workers(free, beside or 0)
    shape = choose_shape(
        (tensor.num_elements for tensor in read_checkpoint(folder).tensors.values()),
        getattr(torch, config.model.dtype).itemsize,
        worker.world_size,
        least[0],
        None if beside is None else least[1],
        logits,
    )
    worker.say(shape.reason)
    return inference_settings(given, shape.stage, config.model.dtype, offload=shape.offload)


def load_for(
    settings: Settings, folder: Path, config: ModelConfig, log: Callable[[str], None], *, head: bool = True
) -> Any:
    """The model, its weights divided among the workers if the settings ask for ZeRO stage 3.

    Raises:
        UserError: the folder's tensors are not those of the model.
    """
    kind = task_of(config).facts.auto_class
    options: dict[str, Any] = {"kind": kind, "head": head, "trust_remote_code": config.trust_remote_code}
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
