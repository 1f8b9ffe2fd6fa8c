"""DeepSpeed: the one place that makes engines and gathers partitioned weights.

DeepSpeed is imported where it is used: only workers need it, and importing it takes seconds and looks for accelerators.
"""

import fcntl
import shlex
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from mpruner_dist.cluster.settings import Settings
from mpruner_dist.cluster.worker import barrier
from mpruner_dist.errors import UserError

LONGEST_COMPILATION_S = 180
"""Of a small C++ file on a busy machine."""


def start_deepspeed(device: torch.device) -> None:
    """Hand DeepSpeed the process group that Ray Train made."""
    import deepspeed

    _allow_spaces_in_library_path()
    if device.type == "cpu":
        compile_collective()
    else:
        torch.backends.cudnn.allow_tf32 = False  # float32 is float32 in convolutions too, as in matrix products
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False)


def compile_collective() -> None:
    """Load DeepSpeed's shared-memory collective for CPUs, which is compiled at first, once a machine."""
    from deepspeed.accelerator import get_accelerator

    _allow_spaces_in_library_path()
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is not None:
        with _alone_in(_build_folder(builder.name)):
            builder.load()


def _build_folder(name: str) -> Path:
    from torch.utils import cpp_extension

    return Path(cpp_extension._get_build_directory(name, verbose=False))


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Inside, no other process of ours compiles there, nor was one killed that did.

    torch marks a compilation by a file called `lock`, and waits for ever for one whose maker was killed. The kernel
    takes our lock from whoever dies; a mark that is there then is another program's, or was left behind.
    """
    with (folder / "mpruner.lock").open("w") as file:
        with suppress(OSError):  # a file system without locks, such as Lustre's default
            fcntl.flock(file, fcntl.LOCK_EX)
        mark = folder / "lock"
        while (age := _age_s(mark)) is not None and age < LONGEST_COMPILATION_S:
            time.sleep(1)
        mark.unlink(missing_ok=True)
        yield


def _age_s(file: Path) -> float | None:
    """Seconds since it was made; None if it is not there."""
    try:
        return time.time() - file.stat().st_mtime
    except FileNotFoundError:
        return None


def _allow_spaces_in_library_path() -> None:
    """torch, through which DeepSpeed compiles, hands its library folder to a shell unquoted."""
    from torch.utils import cpp_extension  # looks for CUDA when it is imported

    path = cpp_extension.TORCH_LIB_PATH
    if not path.startswith("'"):  # not done before
        cpp_extension.TORCH_LIB_PATH = shlex.quote(path)


def make_engine(model: torch.nn.Module, settings: Settings, parameters: Any = None) -> Any:
    """A DeepSpeed engine; without an optimizer in the settings it only runs forward.

    Raises:
        UserError: the device does not compute in float16.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if settings.get("fp16", {}).get("enabled") and not get_accelerator().is_fp16_supported():
        raise UserError("the workers' device does not compute in float16: set model.dtype bfloat16 or float32")
    model.register_forward_pre_hook(_cast, with_kwargs=True)
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        # DeepSpeed makes a group of its own, with nccl's ten minutes of patience, for whoever still loads
        barrier(torch.device(get_accelerator().current_device_name()))
    engine, *_ = deepspeed.initialize(model=model, config=settings, model_parameters=parameters)
    for buffer in model.buffers():  # DeepSpeed moves those of a model with divided weights nowhere
        buffer.data = buffer.data.to(engine.device)
    return engine


def let_go(engine: Any) -> None:
    """Free an engine and its model, once the caller has dropped them too.

    DeepSpeed itself refers to the model of every engine of ZeRO stage 3 for ever.
    """
    from deepspeed.runtime.zero import parameter_offload

    module = engine.module
    engine.destroy()
    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [other for other in stack if other is not module]


def _cast(
    model: torch.nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, in_its_number_type(model, inputs)


def in_its_number_type(model: torch.nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs such as pixels, in the number type of the weights: not every family casts them itself."""
    dtype = next(model.parameters()).dtype
    return {
        name: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def gathered(*parameters: torch.nn.Parameter) -> AbstractContextManager[Any]:
    """All workers enter: inside, these parameters are whole on each of them."""
    if not hasattr(parameters[0], "ds_status"):  # ZeRO stage 3 alone partitions parameters, and then all of them
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(parameters))  # type: ignore[no-any-return]
