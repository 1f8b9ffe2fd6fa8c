"""ZeRO-3 parameters made from their slices alone; the one place that knows how DeepSpeed keeps a partition.

DeepSpeed itself makes a whole parameter, broadcasts it and throws most of it away. Here each worker allocates its slice
and has it filled. What a partition is follows `Init._partition_param` of
deepspeed/runtime/zero/partition_parameters.py.
"""

from collections.abc import Callable
from typing import Any

import torch

from mpruner_dist.cluster.settings import Settings

Fill = Callable[[str, int, torch.Tensor], None]
"""Called with a parameter's name, the first element of a slice of it, counted flat, and where the slice belongs."""


def needs_whole_parameters(settings: Settings) -> str | None:
    """What in this DeepSpeed configuration only DeepSpeed's own partitioning does; None if nothing does."""
    zero = settings["zero_optimization"]
    for name in ("zero_quantized_weights", "zero_quantized_nontrainable_weights"):
        if zero.get(name):
            return f"zero_optimization.{name}"
    for name, least in (("zero_hpz_partition_size", 1), ("mics_shard_size", 0)):
        if zero.get(name, least) > least:
            return f"zero_optimization.{name}"
    return None


def partition_parameters(model: torch.nn.Module, settings: Settings, fill: Fill) -> None:
    """Replace every parameter of a model on the meta device by this worker's partition of it.

    Partitions lie where the settings say: on the worker's device, in CPU memory or on NVMe. Tied parameters stay tied.

    Args:
        model: all of its parameters without memory.
        settings: of ZeRO stage 3.
        fill: gives each slice its values.
    """
    import deepspeed

    init = deepspeed.zero.Init(config_dict_or_path=settings)
    made: dict[int, torch.nn.Parameter] = {}
    metas = []  # kept, so that no id is given twice
    for prefix, module in model.named_modules():
        for name, meta in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(meta) not in made:
                made[id(meta)] = _partitioned(init, f"{prefix}.{name}".lstrip("."), meta, fill)
                metas.append(meta)
            setattr(module, name, made[id(meta)])


def _partitioned(init: Any, name: str, meta: torch.nn.Parameter, fill: Fill) -> torch.nn.Parameter:
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
    from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    # DeepSpeed reads shape and size from the parameter: one element, seen everywhere, has them without the memory
    shaped = torch.zeros((), dtype=meta.dtype, device=init.local_device).expand(meta.shape)
    parameter: Any = torch.nn.Parameter(shaped, requires_grad=meta.requires_grad)
    init._convert_to_deepspeed_param(parameter)
    aligned = parameter.aligned_size()
    size = aligned // parameter.ds_zero_partition_world_size
    on_nvme = init.param_swapper is not None and init.param_swapper.swappable_tensor(numel=size)
    if on_nvme:
        partition: Any = init.param_swapper.get_buffer(parameter, size)
    else:
        partition = torch.empty(size, dtype=meta.dtype, device=_place(init, parameter))
        if init.pin_memory and partition.device.type == "cpu":
            partition = get_accelerator().pin_memory(partition)
    begin = size * parameter.ds_zero_partition_rank
    count = max(min(size, parameter.ds_numel - begin), 0)
    if count:
        fill(name, begin, partition[:count])
    partition[count:].zero_()  # what makes all partitions equally long
    parameter.ds_tensor = partition
    partition.ds_numel = size
    partition.status = PartitionedParamStatus.AVAILABLE
    partition.final_location = OffloadDeviceEnum.nvme if on_nvme else None
    parameter.ds_numel_aligned = aligned
    parameter.data = torch.empty(0, dtype=meta.dtype, device=init.local_device)
    parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE
    if on_nvme:
        init.param_swapper.swap_out_and_release([parameter])
    return parameter  # type: ignore[no-any-return]


def _place(init: Any, parameter: Any) -> Any:
    """The device of a partition that is not on NVMe."""
    if parameter.ds_persist:
        return init.local_device
    return "cpu" if init.remote_device in ("cpu", "nvme") else init.remote_device
