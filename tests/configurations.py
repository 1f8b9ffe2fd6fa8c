"""Configurations as a user would write them, and how they are read."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from mpruner_dist.config import Config
from mpruner_dist.config_file import load_config
from mpruner_dist.errors import UserError


def minimal() -> dict[str, Any]:
    return {
        "model": {"path": "some/model"},
        "data": {"calibration": {"path": "a.jsonl"}, "test": {"path": "b.jsonl"}},
    }


def full() -> dict[str, Any]:
    """Every section but rounds."""
    text = "corpus"
    return {
        "model": {
            "path": "/models/big", "revision": "v2", "task": "text-classification", "dtype": "bfloat16",
            "trust_remote_code": True,
        },
        "data": {
            "block_size": 64,
            "pack": False,
            "calibration": {"path": text, "name": "raw", "split": "all", "text_field": "body", "take": [0.0, 0.1]},
            "train": {"path": text, "name": "raw", "split": "all", "take": [0.1, 0.7]},
            "validation": {"path": text, "name": "raw", "split": "all", "take": [0.7, 0.8]},
            "test": {"path": text, "name": "raw", "split": "all", "take": [0.8, 1.0]},
        },
        "collect": {
            "batch_size": 5, "num_batches": 3, "until": "settled", "settled_z": 3.0, "check_every": 5,
            "estimator": "biased", "unit": "sequence", "samples": 40, "skip_tokens": 0, "outlier_norm": None,
            "normalize": False, "seed": 4, "save_every": 1,
        },
        "plan": {"measure": "updates", "threshold": 0.9, "stride": 2, "protect_first": 2, "protect_last": 0},
        "retrain": {
            "steps": 30, "batch_size": 12, "micro_batch_size": 2, "learning_rate": 3e-5, "min_lr_ratio": 0.0,
            "warmup_steps": 3, "weight_decay": 0.1, "max_grad_norm": 0.5, "zero_stage": 3, "deepspeed": "ds.json",
            "distillation": {
                "weight": 0.25, "temperature": 2.0, "hidden_weight": 0.5, "teacher": "/models/bigger",
            },
            "trainable": "neighbours", "lora": {"rank": 4, "alpha": 8.0, "dropout": 0.1, "targets": ["q_proj"]},
            "activation_checkpointing": True, "log_to": ["tensorboard", "wandb"], "save_every": 5, "eval_every": 7,
            "seed": 8,
        },
        "evaluate": {"batch_size": 1, "max_blocks": 9},
        "cluster": {
            "workers": 3, "min_workers": 2, "wait_s": 0, "device": "cpu", "cpus_per_worker": 2,
            "zero_stage": 3, "deepspeed": "inference.json",
            "address": "ray://host:10001", "max_restarts": 0,
        },
    }  # fmt: skip


def data(**of_all: Any) -> dict[str, Any]:
    """The four parts, of one source."""
    cuts = {"calibration": [0.0, 0.1], "train": [0.1, 0.7], "validation": [0.7, 0.8], "test": [0.8, 1.0]}
    return {part: {"path": "corpus", "take": take, **of_all} for part, take in cuts.items()}


def load(folder: Path, content: Any, *overrides: str) -> Config:
    path = folder / "config.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return load_config(path, list(overrides))


def refusal(folder: Path, content: Any, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, content, *overrides)
    return str(caught.value)
