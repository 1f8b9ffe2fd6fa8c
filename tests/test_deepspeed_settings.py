"""DeepSpeed configurations: filled in where they say "auto" or nothing, refused where they contradict the run."""

import copy
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT

from mpruner_dist.cluster.settings import (
    dtype_settings,
    fill_in,
    given_stage,
    inference_settings,
    read_deepspeed_config,
    zero_stage,
)
from mpruner_dist.config import RetrainConfig
from mpruner_dist.errors import UserError
from mpruner_dist.retraining.settings import hidden_size, training_settings

RETRAIN = RetrainConfig(
    steps=40, batch_size=24, micro_batch_size=2, learning_rate=3e-5, min_lr_ratio=0.2, warmup_steps=4,
    weight_decay=0.1, max_grad_norm=0.7, zero_stage=2,
)  # fmt: skip


def training(given: dict[str, Any], **changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {"config": RETRAIN, "dtype": "bfloat16", "workers": 3, "width": 64} | changes
    return training_settings(given, **arguments)


def test_without_a_file_everything_follows_from_the_run() -> None:
    made = training({})
    assert made["train_batch_size"] == 24
    assert made["train_micro_batch_size_per_gpu"] == 2
    assert made["gradient_accumulation_steps"] == 4
    assert made["gradient_clipping"] == 0.7
    assert made["zero_optimization"] == {"stage": 2}
    assert made["bf16"] == {"enabled": True}
    assert made["fp16"] == {"enabled": False}
    assert made["optimizer"]["type"] == "AdamW"
    assert made["optimizer"]["params"]["lr"] == 3e-5
    assert made["optimizer"]["params"]["weight_decay"] == 0.1
    schedule = made["scheduler"]["params"]
    assert (schedule["total_num_steps"], schedule["warmup_num_steps"], schedule["cos_min_ratio"]) == (40, 4, 0.2)


AUTO: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale": 0},
    "zero_optimization": {"stage": "auto", "overlap_comm": True, "offload_optimizer": {"device": "cpu"}},
    "optimizer": {"type": "Adam", "params": {"lr": "auto", "weight_decay": "auto", "betas": [0.9, 0.99]}},
    "scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": "auto", "warmup_num_steps": 7}},
}


def test_auto_is_answered_wherever_it_stands_and_the_rest_is_kept() -> None:
    given = copy.deepcopy(AUTO)
    made = training(given)
    assert given == AUTO  # the user's own is not touched
    assert "auto" not in json.dumps(made)
    assert (made["train_batch_size"], made["gradient_clipping"]) == (24, 0.7)
    assert made["bf16"] == {"enabled": True}
    assert made["fp16"] == {"enabled": False, "loss_scale": 0}
    assert made["zero_optimization"] == {"stage": 2, "overlap_comm": True, "offload_optimizer": {"device": "cpu"}}
    assert made["optimizer"] == {"type": "Adam", "params": {"lr": 3e-5, "weight_decay": 0.1, "betas": [0.9, 0.99]}}
    assert made["scheduler"]["params"] == {"total_num_steps": 40, "warmup_num_steps": 7}


def test_whole_sections_may_be_auto() -> None:
    made = training({"optimizer": "auto", "zero_optimization": "auto", "scheduler": "auto"})
    assert made == training({})


@pytest.mark.parametrize("value", ["auto", True, [1]])
def test_a_section_that_must_be_a_table_and_is_not_is_answered_or_refused_by_name(value: Any) -> None:
    if value == "auto":
        assert training({"bf16": value})["bf16"] == {"enabled": True}
    else:
        with pytest.raises(UserError, match="bf16"):
            training({"bf16": value})


def test_null_is_as_if_it_were_not_there(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"optimizer": null, "scheduler": null, "zero_optimization": null, "gradient_clipping": null}')
    assert read_deepspeed_config(path) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"scheduler": "WarmupLR"}, 'scheduler must be a table of settings, or "auto"'),
        ({"optimizer": "Adam"}, "optimizer must be a table"),
        ({"zero_optimization": 3}, "zero_optimization must be a table"),
        ({"zero_optimization": {"stage": "3"}}, "zero_optimization.stage '3' must be 0, 1, 2, 3 or"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage 4 must be"),
        ({"scheduler": {"params": {}}}, 'scheduler has no type: name it, such as "WarmupCosineLR"'),
        ({"optimizer": {"params": {"lr": 1}}}, 'optimizer has no type: name it, such as "AdamW"'),
    ],
)
def test_a_section_of_the_wrong_form_is_refused_by_name(tmp_path: Path, content: Any, message: str) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=re.escape(message)):
        read_deepspeed_config(tmp_path / "ds.json")


def test_the_stage_that_is_asked_for() -> None:
    assert given_stage({"zero_optimization": "auto"}, 3) == 3
    assert given_stage({"zero_optimization": {"offload_param": {}}}, "auto") == "auto"
    assert given_stage({"zero_optimization": {"stage": 0}}, 3) == 0
    assert zero_stage(inference_settings({"zero_optimization": "auto"}, 3, "float32")) == 3


def test_the_users_optimizer_and_scheduler_are_kept() -> None:
    mine = {"type": "Lion", "params": {"lr": 1.0}}
    schedule = {"type": "WarmupLR", "params": {"warmup_max_lr": 1.0}}
    made = training({"optimizer": mine, "scheduler": schedule, "wall_clock_breakdown": True})
    assert made["optimizer"] == mine
    assert made["scheduler"]["params"] == {"warmup_max_lr": 1.0, "warmup_num_steps": 4}
    assert made["wall_clock_breakdown"] is True


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_zero_section_that_leaves_the_stage_out_gets_that_of_the_run(stage: int) -> None:
    config = RETRAIN.model_copy(update={"zero_stage": stage})
    made = training({"zero_optimization": {"overlap_comm": True}}, config=config)
    assert zero_stage(made) == stage
    assert made["zero_optimization"]["overlap_comm"] is True


def test_an_inference_zero_section_that_leaves_the_stage_out_gets_that_of_the_run() -> None:
    assert (
        zero_stage(inference_settings({"zero_optimization": {"offload_param": {"device": "cpu"}}}, 3, "float32")) == 3
    )


@pytest.mark.parametrize(
    ("given", "key", "value", "needed"),
    [
        ({"train_batch_size": 25}, "train_batch_size", 25, 24),
        ({"train_micro_batch_size_per_gpu": 1}, "train_micro_batch_size_per_gpu", 1, 2),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps", 1, 4),
        ({"bf16": {"enabled": False}}, "bf16.enabled", False, True),
        ({"fp16": {"enabled": True}}, "fp16.enabled", True, False),
        ({"train_batch_size": None}, "train_batch_size", None, 24),
    ],
)
def test_a_contradiction_names_key_and_both_values(given: Any, key: str, value: Any, needed: Any) -> None:
    with pytest.raises(UserError, match='write "auto" there or change the run\'s') as caught:
        training(given)
    assert f"sets {key} = {value!r}, the run needs {needed!r}" in str(caught.value)


def test_the_user_may_repeat_what_follows_from_the_run() -> None:
    given = {"train_batch_size": 24, "gradient_accumulation_steps": 4, "bf16": {"enabled": True}}
    assert training(given) == training({})


@pytest.mark.parametrize(
    ("given", "key"),
    [
        (
            {"zero_optimization": {"stage": 1, "allgather_bucket_size": "auto"}},
            "zero_optimization.allgather_bucket_size",
        ),
        ({"optimizer": {"type": "AdamW", "params": {"amsgrad": "auto"}}}, "optimizer.params.amsgrad"),
        ({"steps_per_print": "auto"}, "steps_per_print"),
        ({"mine": {"deep": {"deeper": "auto"}}}, "mine.deep.deeper"),
    ],
)
def test_an_auto_that_nothing_answers_is_refused_by_key(given: Any, key: str) -> None:
    with pytest.raises(UserError, match="the run does not set it: give a value") as caught:
        training(given)
    assert f'says {key} = "auto"' in str(caught.value)


def test_auto_means_what_it_means_to_transformers(tmp_path: Path) -> None:
    """Beside transformers' own answers, from the same values."""
    from transformers import TrainingArguments
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig, unset_hf_deepspeed_config

    given = {
        **AUTO,
        "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
        "zero_optimization": {
            "stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
        },
    }  # fmt: skip
    wanted = dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps"), "auto")
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=4, learning_rate=3e-5,
        weight_decay=0.1, max_grad_norm=0.7, warmup_steps=4, bf16=True, use_cpu=True, report_to=[],
    )  # fmt: skip
    for kind, more in (("WarmupLR", {}), ("WarmupDecayLR", {"total_num_steps": "auto"})):
        given["scheduler"] = {"type": kind, "params": wanted | more}
        theirs = HfTrainerDeepSpeedConfig(copy.deepcopy(given))
        theirs.trainer_config_process(arguments)
        theirs.trainer_config_finalize(arguments, SimpleNamespace(config=SimpleNamespace(hidden_size=64)), 40)
        unset_hf_deepspeed_config()
        mine = training(given, workers=1, config=RETRAIN.model_copy(update={"batch_size": 8}))
        assert mine == theirs.config
    assert "reduce_bucket_size" not in json.dumps(training({}))  # only where it is asked for


@pytest.mark.parametrize(
    ("config", "width"),
    [
        ({"hidden_size": 8}, 8), ({"n_embd": 9}, 9), ({"d_model": 7}, 7), ({"text_config": {"hidden_size": 6}}, 6),
        ({"hidden_sizes": [1, 2]}, None),
    ],
)  # fmt: skip
def test_the_width_is_found_by_the_names_that_families_give_it(config: dict[str, Any], width: int | None) -> None:
    assert hidden_size(config) == width


def test_a_bucket_size_that_no_width_answers_is_refused() -> None:
    given = {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}
    with pytest.raises(UserError, match="reduce_bucket_size"):
        training(given, width=None)


def test_without_warm_up_the_first_step_has_the_whole_rate() -> None:
    params = training({}, config=RETRAIN.model_copy(update={"warmup_steps": 0}))["scheduler"]["params"]
    assert (params["warmup_num_steps"], params["warmup_min_ratio"]) == (1, 1.0)


@pytest.mark.parametrize(
    ("dtype", "bf16", "fp16"), [("float32", False, False), ("bfloat16", True, False), ("float16", False, True)]
)
def test_dtypes(dtype: str, bf16: bool, fp16: bool) -> None:
    assert dtype_settings(dtype) == {"bf16": {"enabled": bf16}, "fp16": {"enabled": fp16}}


@pytest.mark.parametrize("stage", [0, 3])
def test_inference_takes_the_stage_of_the_run_or_of_the_file(stage: int) -> None:
    made = inference_settings({}, stage, "float32")
    assert zero_stage(made) == stage
    assert made["train_micro_batch_size_per_gpu"] == 1
    assert "optimizer" not in made
    other = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    assert inference_settings(other, stage, "float32")["zero_optimization"] == other["zero_optimization"]


@pytest.mark.parametrize("stage", [1, 2])
def test_inference_refuses_stages_that_divide_an_optimizer(stage: int) -> None:
    with pytest.raises(UserError, match=f"ZeRO stage 0 or 3, not {stage}"):
        inference_settings({"zero_optimization": {"stage": stage}}, 0, "float32")


def test_zero_stage_of_nothing_is_zero() -> None:
    assert zero_stage({}) == 0
    assert zero_stage({"zero_optimization": {}}) == 0


def test_fill_in_prefers_required_over_default_and_given_over_default() -> None:
    made = fill_in({"a": "auto", "b": 5, "c": "auto"}, {"a": 1}, {"a": 9, "b": 9, "c": 3, "d": 4})
    assert made == {"a": 1, "b": 5, "c": 3, "d": 4}


def test_an_answer_may_be_zero_or_false() -> None:
    assert fill_in({"a": "auto", "b": "auto"}, {}, {"a": 0, "b": False}) == {"a": 0, "b": False}


def test_a_file_is_read_or_refused_by_name(tmp_path: Path) -> None:
    assert read_deepspeed_config(None) == {}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(AUTO))
    assert read_deepspeed_config(path) == AUTO
    for content in ("{", "", "[1]", "3"):
        path.write_text(content)
        with pytest.raises(UserError, match=r"DeepSpeed configuration: .*ds\.json"):
            read_deepspeed_config(path)
    with pytest.raises(UserError, match=r"DeepSpeed configuration: .*none\.json"):
        read_deepspeed_config(tmp_path / "none.json")


def test_what_a_file_leaves_out_of_optimizer_and_schedule_is_the_runs() -> None:
    """DeepSpeed's own rate is 1e-3."""
    for section in ({"type": "AdamW"}, {"type": "AdamW", "params": {"betas": [0.9, 0.95]}}):
        params = training({"optimizer": section})["optimizer"]["params"]
        assert params == section.get("params", {}) | {"lr": 3e-5}
    assert training({"optimizer": {"type": "Lion", "params": {"lr": 1e-4}}})["optimizer"]["params"]["lr"] == 1e-4
    warmup = training({"scheduler": {"type": "WarmupLR"}})["scheduler"]["params"]
    assert warmup == {"warmup_num_steps": 4, "warmup_max_lr": 3e-5}
    decay = training({"scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 7}}})["scheduler"]["params"]
    assert (decay["warmup_num_steps"], decay["total_num_steps"], decay["warmup_max_lr"]) == (7, 40, 3e-5)
    cosine = training({"scheduler": {"type": "WarmupCosineLR"}})["scheduler"]["params"]
    assert cosine == {"total_num_steps": 40, "warmup_num_steps": 4}


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "deepspeed").glob("*.json")), ids=lambda path: path.name)
def test_forward_passes_take_what_a_file_says_of_weights_alone(path: Path) -> None:
    given = read_deepspeed_config(path)
    if zero_stage(given) != 3:
        with pytest.raises(UserError, match=f"ZeRO stage 0 or 3, not {zero_stage(given)}"):
            inference_settings(given, 0, "float32")
        return
    made = inference_settings(given | {"optimizer": {"type": "AdamW"}}, 0, "float32")
    assert made["zero_optimization"]["stage"] == 3
    assert made["zero_optimization"].get("offload_param") == given["zero_optimization"].get("offload_param")
    assert not {"optimizer", "train_batch_size", "gradient_clipping"} & made.keys()
    assert "offload_optimizer" not in made["zero_optimization"]
    assert "auto" not in json.dumps(made)
