"""A run folder with small artefacts of every stage, for whatever tells of a run."""

import json
from pathlib import Path

import numpy as np

from mpruner_dist.config import Config

DEPTH, DROPPED = 6, [2, 4]
STAGES = {"collect": {"state": "done", "seconds": 425.0}, "report": {"state": "running"}}


def similarities(depth: int) -> tuple[np.ndarray, np.ndarray]:
    distance = np.abs(np.subtract.outer(np.arange(depth), np.arange(depth)))
    return np.exp(-0.02 * distance), 0.001 * distance


def make_config(retrain: bool = True, **changes: dict) -> Config:
    parts = ("calibration", "train", "validation", "test")
    content: dict = {
        "model": {"path": "owner/little-model"},
        "data": {part: {"path": f"{part}.txt"} for part in parts},
        "plan": {"method": "partition", "keep_layers": DEPTH - len(DROPPED)},
    }
    if retrain:
        content["retrain"] = {"steps": 30}
    return Config.model_validate(content | changes)


def make_run(run: Path, retrain: bool = True) -> Path:
    cka, stderr = similarities(DEPTH)
    names = [f"model.layers.{layer}" for layer in range(DEPTH)]
    angles, no_errors = np.abs(np.subtract.outer(np.arange(DEPTH + 1), np.arange(DEPTH + 1))) / 40, [0.01] * DEPTH
    angles[2, 4] = angles[4, 2] = 0.01
    measured = {"cka": cka.tolist(), "stderr": stderr.tolist()}
    similarity = measured | {
        "layers": names, "num_batches": 4, "asked_batches": 8, "num_samples": 99, "unit": "token", "open": None,
        "estimator": "of some kind", "updates": measured, "block_influence": [0.5, 0.04, 0.03, 0.02, 0.01, 0.6],
        "block_influence_stderr": no_errors, "angular_distance": angles.tolist(),
        "angular_distance_stderr": (angles / 100).tolist(), "top_share": [0.02] * DEPTH, "dominated": [],
        "null": {"mean": 0.0013, "quantile": 0.0456, "level": 0.99, "permutations": 4},
    }  # fmt: skip
    kept = [layer for layer in range(DEPTH) if layer not in DROPPED]
    reasons = {str(layer): {"like": layer - 1, "cka": 0.98, "stderr": 0.001} for layer in DROPPED}
    plan = {"num_layers": DEPTH, "kept": kept, "clusters": [[0], [1, 2], [3, 4], [5]], "reasons": reasons}
    entry = {"bytes": 4000, "loss": 1.0, "tokens": 1234, "tokens_per_second": 10.0, "workers": 1, "device": "cpu"}
    evaluation = {
        "original": entry | {"layers": 6, "parameters": 1_000_000_000, "perplexity": 10.0},
        "pruned": entry | {"layers": 4, "parameters": 800_000_000, "perplexity": 20.0},
    }
    parts = {
        part: {"blocks": 2, "tokens": 16, "digest": "abc", "records_also_in": {}}
        for part in ("calibration", "train", "validation", "test")
    }
    artefacts = {"cka": similarity, "plan": plan, "data/data": {"block_size": 8, "packed": True, "parts": parts}}
    if retrain:
        evaluation["retrained"] = evaluation["pruned"] | {"perplexity": 11.0}
        artefacts["retrain"] = {"loss": [[1, 3.0], [2, 2.5]], "validation_loss": [[0, 3.1], [2, 2.6]]}
    for name, content in (artefacts | {"evaluation": evaluation}).items():
        path = run / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    for folder in ("pruned", "retrained") if retrain else ("pruned",):
        (run / folder).mkdir()
    return run


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
