"""A model from its folder: configuration, skeleton on the meta device, weights."""

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch.overrides import TorchFunctionMode

from mpruner_dist.data.model_folder import CONFIG_ERRORS, read_config
from mpruner_dist.errors import UserError

LARGE = 1 << 24
"""Elements from which on a new tensor can only be a parameter."""


def model_class(config: Any) -> Any:
    """The class that the checkpoint was saved from; for code of its own, the causal language model that it names."""
    named = getattr(transformers, (config.architectures or [""])[0], None)
    if named is not None and not hasattr(config, "auto_map"):
        return named
    known = type(config) in transformers.AutoModelForCausalLM._model_mapping
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    return transformers.AutoModelForCausalLM if known or remote else transformers.AutoModel


def empty_model(config: Any, trust_remote_code: bool = False) -> Any:
    """The model of a configuration without weights: parameters on the meta device, buffers as they are computed.

    Nothing large is allocated, not even for a moment: one parameter of a mixture of experts may exceed the memory.

    Raises:
        UserError: the configuration makes no model.
    """
    kind = model_class(config)
    config = copy.deepcopy(config)  # models write into it
    try:
        with _LargeOnMeta(), init_empty_weights(include_buffers=False):
            if hasattr(kind, "from_config"):
                model = kind.from_config(config, trust_remote_code=trust_remote_code)
            else:
                model = kind._from_config(config)
    except CONFIG_ERRORS as error:
        raise UserError(f"config.json of type {config.model_type!r} makes no {kind.__name__}: {error}") from error
    model.tie_weights()  # inside, every name was given a parameter of its own
    return model.eval()


class _LargeOnMeta(TorchFunctionMode):
    """Makes large new tensors on the meta device; whatever is computed, such as buffers, is small."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn):
            on_meta = function(*args, **(kwargs | {"device": "meta"}))
            if on_meta.numel() > LARGE:
                return on_meta
        return function(*args, **kwargs)


def load_model(
    folder: Path,
    dtype: str,
    *,
    kind: str = "AutoModelForCausalLM",
    head: bool = True,
    trust_remote_code: bool = False,
    partition: dict[str, Any] | None = None,
) -> torch.nn.Module:
    """The model with its weights, in eval mode, on the CPU.

    Args:
        folder: a Hugging Face folder.
        dtype: number type of the weights, or "auto" for the checkpoint's own.
        kind: name of the class of transformers that the task asks for.
        head: False leaves what the task adds to the plain model out, such as the projection to the vocabulary.
        trust_remote_code: run code that lies in the folder.
        partition: a DeepSpeed configuration of ZeRO stage 3: each worker gets its slice of every weight.

    Raises:
        UserError: a tensor is missing or has the wrong shape; transformers would take random numbers for it.
    """
    whole = getattr(transformers, kind)
    problems = key_problems(folder, trust_remote_code, unexpected=False, kind=whole)
    if problems:
        raise UserError(
            f"{folder} does not fit its configuration: {'; '.join(problems[:3])}; fetch it again, or set model.task to "
            f"what it was trained for ({kind} was asked for)"
        )
    auto = whole if head else transformers.AutoModel
    options = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if partition is None:
        model = auto.from_pretrained(folder, **options)
    else:
        # imported here: it imports DeepSpeed, which takes seconds and looks for accelerators
        from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

        keep_alive = HfDeepSpeedConfig(partition)  # transformers only refers to it weakly
        try:
            model = auto.from_pretrained(folder, **options)
        finally:
            del keep_alive
            unset_hf_deepspeed_config()
    model.config.use_cache = False
    return model.eval()  # type: ignore[no-any-return]


def key_problems(
    folder: Path, trust_remote_code: bool = False, *, unexpected: bool = True, kind: Any = None
) -> list[str]:
    """Tensors that the model on the meta device lacks or wants in another shape, and those that it does not ask for.

    Nothing is read. transformers itself compares, so that names which it converts while loading are judged as it will
    load them.
    """
    quiet_transformers()
    config = read_config(folder, trust_remote_code)
    kind = kind or model_class(config)
    try:
        _, report = kind.from_pretrained(
            folder,
            device_map="meta",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
        )
    except (ImportError, RuntimeError) as error:  # a package, or a GPU, that a quantised model needs
        if not hasattr(config, "quantization_config"):
            raise
        raise UserError(f"{folder} cannot be laid out here: {error}") from error
    return [
        *(f"{name} is missing" for name in sorted(report["missing_keys"])),
        *(
            f"{name} is {list(found)}, must be {list(asked)}"
            for name, found, asked in sorted(report["mismatched_keys"])
        ),
        *(f"{name} is not asked for" for name in sorted(report["unexpected_keys"]) if unexpected),
    ]


def quiet_transformers() -> None:
    """No bars and no load reports: a base model rightly leaves the head's weights unread."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
