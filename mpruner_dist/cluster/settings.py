"""DeepSpeed configurations as data: a user's JSON, completed from the run's own. Imports no DeepSpeed."""

from pathlib import Path
from typing import Any

from mpruner_dist.errors import UserError
from mpruner_dist.runs.json_files import read_json

Settings = dict[str, Any]

OF_TRAINING = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "optimizer", "scheduler",
)  # fmt: skip

TYPES = {"optimizer": "AdamW", "scheduler": "WarmupCosineLR"}
"""Sections that are nothing without a type, and which it is where nobody names one."""


def read_deepspeed_config(path: Path | None) -> Settings:
    """A user's DeepSpeed JSON, without what it sets to null; empty without one.

    Raises:
        UserError: unreadable, or no JSON object; or a section of it is no table, or has no type where it needs one.
    """
    if path is None:
        return {}
    try:
        content = {key: value for key, value in read_json(path).items() if value is not None}
    except UserError as error:
        raise UserError(f"the DeepSpeed configuration: {error}") from error
    for key in (*TYPES, "zero_optimization"):
        section = content.get(key, "auto")
        if section == "auto":
            continue
        if not isinstance(section, dict):
            raise UserError(f'the DeepSpeed configuration {path}: {key} must be a table of settings, or "auto"')
        if key in TYPES and not isinstance(section.get("type"), str):
            raise UserError(
                f'the DeepSpeed configuration {path}: {key} has no type: name it, such as "{TYPES[key]}", or write '
                f'"auto" for all of {key}'
            )
    stage = given_stage(content, "auto")
    if stage != "auto" and stage not in range(4):
        raise UserError(
            f'the DeepSpeed configuration {path}: zero_optimization.stage {stage!r} must be 0, 1, 2, 3 or "auto"'
        )
    return content


def fill_in(given: Settings, required: Settings, defaults: Settings, answers: Settings | None = None) -> Settings:
    """A user's settings, completed.

    Args:
        given: what the user wrote; "auto" stands for "you know".
        required: what follows from the run; the user may repeat it but not contradict it.
        defaults: used where the user wrote nothing, or "auto".
        answers: used only where the user wrote "auto".

    Raises:
        UserError: a contradiction, or an "auto" that nothing here answers.
    """
    _require_agreement(given, required, "")
    filled = defaults | given
    for key, value in given.items():
        answer = required.get(key, defaults.get(key))
        if isinstance(value, dict) and isinstance((answers or {}).get(key), dict):
            answer = (answer or {}) | (answers or {})[key]
        filled[key] = _answer_auto(value, answer, key)
    if isinstance(filled.get("zero_optimization"), dict):  # the one section of which a user may well write only a part
        filled["zero_optimization"] = defaults.get("zero_optimization", {}) | filled["zero_optimization"]
    return _merged(filled, required)


def _require_agreement(given: Settings, required: Settings, where: str) -> None:
    for key, value in required.items():
        known = given.get(key, "auto")
        if known == "auto":
            continue
        if isinstance(value, dict) and not isinstance(known, dict):
            raise UserError(
                f"the DeepSpeed configuration sets {where}{key} = {known!r}, it must hold a table of settings"
            )
        if isinstance(value, dict):
            _require_agreement(known, value, f"{where}{key}.")
        elif known != value:
            raise UserError(
                f"the DeepSpeed configuration sets {where}{key} = {known!r}, the run needs {value!r}: write "
                '"auto" there or change the run\'s configuration'
            )


def _answer_auto(value: Any, answer: Any, where: str) -> Any:
    if isinstance(value, dict):
        answers = answer if isinstance(answer, dict) else {}
        return {key: _answer_auto(inner, answers.get(key), f"{where}.{key}") for key, inner in value.items()}
    if value != "auto":
        return value
    if answer is None:
        raise UserError(f'the DeepSpeed configuration says {where} = "auto", and the run does not set it: give a value')
    return answer


def _merged(below: Settings, above: Settings) -> Settings:
    merged = dict(below)
    for key, value in above.items():
        merged[key] = _merged(below.get(key) or {}, value) if isinstance(value, dict) else value
    return merged


def dtype_settings(dtype: str) -> Settings:
    """The part of a DeepSpeed configuration that sets the number type."""
    return {"bf16": {"enabled": dtype == "bfloat16"}, "fp16": {"enabled": dtype == "float16"}}


def zero_stage(settings: Settings) -> int:
    """ZeRO stage of a completed DeepSpeed configuration."""
    return int(settings.get("zero_optimization", {}).get("stage", 0))


def quantized(given: Settings) -> Settings:
    """What of a user's zero_optimization rounds weights or gradients coarsely, on which results then depend."""
    zero = given.get("zero_optimization")
    return {key: value for key, value in zero.items() if "quantized" in key} if isinstance(zero, dict) else {}


def given_stage(given: Settings, otherwise: Any) -> Any:
    """ZeRO stage that a user's DeepSpeed configuration asks for, or "auto"; `otherwise` if it asks for none."""
    zero = given.get("zero_optimization")
    return zero.get("stage", otherwise) if isinstance(zero, dict) else otherwise


def inference_settings(given: Settings, stage: int, dtype: str, *, offload: bool = False) -> Settings:
    """A DeepSpeed configuration for forward passes only; `stage` and `offload` where the given one does not say.

    What a given one says of training is left out.

    Raises:
        UserError: a contradiction, or a ZeRO stage that has no meaning without an optimizer.
    """
    required = {"train_micro_batch_size_per_gpu": 1, **dtype_settings(dtype)}
    given = {key: value for key, value in given.items() if key not in OF_TRAINING}
    if isinstance(partition := given.get("zero_optimization"), dict):  # "auto": as DeepSpeed has it by itself
        given["zero_optimization"] = {
            key: value
            for key, value in partition.items()
            if key == "stage" or (key != "offload_optimizer" and value != "auto")
        }
    zero: Settings = {"stage": stage}
    if offload:
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    settings = fill_in(given, required, {"zero_optimization": zero})
    if zero_stage(settings) not in (0, 3):
        raise UserError(f"collection and evaluation run under ZeRO stage 0 or 3, not {zero_stage(settings)}")
    return settings
