"""DeepSpeed: the one place that makes engines and gathers partitioned weights."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from mpruner_dist.cluster.settings import Settings


def start_deepspeed(device: torch.device) -> None:
    """Hand DeepSpeed the process group that Ray Train made."""
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False)


def compile_collective() -> None:
    """Compile DeepSpeed's shared-memory collective for CPUs now, once a machine, and not in the first run."""
    builder = deepspeed.accelerator.get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is not None:
        builder.load()


def make_engine(model: torch.nn.Module, settings: Settings, parameters: Any = None) -> Any:
    """A DeepSpeed engine; without an optimizer in the settings it only runs forward."""
    engine, *_ = deepspeed.initialize(model=model, config=settings, model_parameters=parameters)
    return engine


def gathered(parameter: torch.nn.Parameter) -> AbstractContextManager[Any]:
    """All workers enter: inside, the parameter is whole on each of them."""
    partitioned = getattr(parameter, "ds_status", ZeroParamStatus.AVAILABLE) != ZeroParamStatus.AVAILABLE
    if partitioned:
        return deepspeed.zero.GatheredParameters([parameter])  # type: ignore[no-any-return]
    return nullcontext()
