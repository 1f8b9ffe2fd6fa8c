"""A model whose weights are divided among the workers, each of which reads its own slices and nothing else."""

from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights

from mpruner_dist.checkpoints.folder import CheckpointFolder, read_checkpoint
from mpruner_dist.checkpoints.header import TensorInfo
from mpruner_dist.checkpoints.slices import TORCH_DTYPES, read_slice
from mpruner_dist.cluster.partition import needs_whole_parameters, partition_parameters
from mpruner_dist.cluster.settings import Settings
from mpruner_dist.data.model_folder import read_config
from mpruner_dist.models.naming import model_names

FLOATS = {"F64", "F32", "F16", "BF16"}


class CannotStream(Exception):
    """Why a checkpoint has to be loaded by transformers itself."""


def stream_model(
    folder: Path, dtype: str, settings: Settings, *, kind: str, head: bool, trust_remote_code: bool
) -> Any:
    """The model in eval mode, its parameters partitioned as DeepSpeed does under ZeRO stage 3.

    Args:
        folder: a Hugging Face folder.
        dtype: number type of the weights.
        settings: a DeepSpeed configuration of stage 3.
        kind: name of the class of transformers that the task asks for.
        head: False leaves what the task adds to the plain model out.
        trust_remote_code: run code that lies in the folder.

    Raises:
        CannotStream: the tensors are not the parameters as they are, or the settings ask for more.
    """
    feature = needs_whole_parameters(settings)
    if feature:
        raise CannotStream(f"{feature} is set")
    checkpoint = read_checkpoint(folder)
    model = _without_weights(folder, dtype, kind if head else "AutoModel", trust_remote_code)
    _require_plain(model, dtype)
    tensors = _names_in_model(model, checkpoint)
    computed = _computed(model, tensors)
    sources = _sources(model, tensors, computed)
    where = {name: folder / shard for shard, header in checkpoint.shards.items() for name in header.tensors}

    def fill(name: str, begin: int, target: torch.Tensor) -> None:
        if name in computed:
            target.copy_(computed[name].view(-1)[begin : begin + len(target)])
            return
        read_slice(where[sources[name].name], sources[name], begin, target)

    partition_parameters(model, settings, fill)
    _read_buffers(model, tensors, where)
    if model.can_generate():
        model.generation_config = _generation_config(folder)
    model.config.use_cache = False
    return model.eval()


def _generation_config(folder: Path) -> Any:
    """What `from_pretrained` reads: older folders say in config.json how to generate."""
    read = transformers.GenerationConfig.from_pretrained
    if (folder / transformers.utils.GENERATION_CONFIG_NAME).is_file():
        return read(folder)
    return read(folder, config_file_name=transformers.utils.CONFIG_NAME, _from_model_config=True)


def _without_weights(folder: Path, dtype: str, kind: str, trust_remote_code: bool) -> Any:
    """Parameters on the meta device; buffers real, for some are computed and lie in no file."""
    auto, config = getattr(transformers, kind), read_config(folder, trust_remote_code)
    with init_empty_weights(include_buffers=False):
        model = auto.from_config(config, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code)
    model.tie_weights()  # inside, every name was given a parameter of its own
    return model


def _require_plain(model: Any, dtype: str) -> None:
    if getattr(model.config, "quantization_config", None) is not None:
        raise CannotStream("its weights are quantised")
    kept = list(model._get_dtype_plan(getattr(torch, dtype)))  # in bfloat16 fewer families keep any than in float16
    if kept:
        raise CannotStream(f"in {dtype} it keeps modules such as {kept[0]} in float32")


def _names_in_model(model: Any, checkpoint: CheckpointFolder) -> dict[str, TensorInfo]:
    """Every tensor by the name that transformers gives it."""
    tensors, renamed = checkpoint.tensors, {}
    for name, (key, converter) in model_names(model, tensors).items():
        if converter is not None:
            raise CannotStream(f"transformers merges or splits tensors such as {name} while it loads")
        renamed[key] = tensors[name]
    return renamed


def _computed(model: Any, tensors: dict[str, TensorInfo]) -> dict[str, torch.Tensor]:
    """Positions that lie in no file, such as Marian's, as their own class computes them."""
    return {
        f"{name}.weight": module.create_weight()
        for name, module in model.named_modules()
        if hasattr(module, "create_weight") and f"{name}.weight" not in tensors
    }


def _sources(model: Any, tensors: dict[str, TensorInfo], computed: dict[str, torch.Tensor]) -> dict[str, TensorInfo]:
    """The tensor of each parameter that is not computed, by the first name of a parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    sources = {}
    for name, parameter in model.named_parameters():
        if name in computed:
            continue
        info = next((tensors[tied] for tied in names[id(parameter)] if tied in tensors), None)
        if info is None:
            raise CannotStream(f"it has no tensor {name}")
        if info.shape != tuple(parameter.shape) or info.dtype not in FLOATS:
            raise CannotStream(f"{info.name} is {info.dtype} {list(info.shape)}, not {list(parameter.shape)}")
        sources[name] = info
    return sources


def _read_buffers(model: Any, tensors: dict[str, TensorInfo], where: dict[str, Path]) -> None:
    """Read those buffers of the model's state that lie in the files."""
    state = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in state and name in tensors:
            info = tensors[name]
            value = torch.empty(info.num_elements, dtype=TORCH_DTYPES[info.dtype])
            read_slice(where[info.name], info, 0, value)
            buffer.copy_(value.view(buffer.shape))
