"""The loop of rounds on real run folders and manifests, with stages that only write what its decisions need."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mpruner_dist import rounds
from mpruner_dist.config import Config
from mpruner_dist.plan import Plan, read_plan
from mpruner_dist.runs.commit import write_json
from mpruner_dist.runs.folder import open_run

DEPTH = 12


def make_config(
    tolerance: float = 0.1,
    metric: str = "perplexity",
    plan: dict | None = None,
    model_task: str = "causal-lm",
    **options: Any,
) -> Config:
    parts = ("calibration", "train", "validation", "test")
    return Config.model_validate({
        "model": {"path": "original", "task": model_task},
        "data": {part: {"path": f"{part}.txt"} for part in parts},
        "plan": plan or {"method": "anchor"},
        "retrain": {"steps": 30},
        "rounds": {"tolerance": tolerance, "metric": metric, **options},
    })  # fmt: skip


class Loop:
    """A run; `plan` and `value` stand for what its models would do."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, config: Config) -> None:
        self.folder, self.config = folder, config
        self.plan: Callable[[int, Any], list[int]] = lambda depth, plan: list(range(2, depth, plan.stride + 1))
        self.value: Callable[[list[int]], float] = lambda kept: 10.0 + (DEPTH - len(kept)) / 10
        self.made: list[str] = []
        self.stacks: dict[str, int] | None = None
        monkeypatch.setattr(rounds, "STEPS", {n: self.step(n) for n in ("collect", "plan", "rewrite", "retrain")})
        monkeypatch.setattr(rounds, "ROUND_STEPS", {name: self.step(name) for name in ("baseline", "gate", "result")})
        monkeypatch.setattr(rounds, "Road", self.road)

    def road(self, config: Config, folder: Any, run: Any = None, layers: Any = None) -> Any:
        def read() -> Plan:
            return read_plan(folder / "plan.json")

        def stacks() -> list[int]:
            return list(self.stacks.values()) if self.stacks else [len(self.layers(config.model.path))]

        return SimpleNamespace(
            config=config, folder=folder, run=run, plan=read, result=folder / "retrained", stacks=stacks
        )

    def step(self, name: str) -> Any:
        def step(road: Any) -> Any:
            where = road.folder / f"{name}.json"
            outputs = (where.name, "cka.json") if name == "collect" else (where.name,)
            return {"model": road.config.model.path}, outputs, lambda: write_json(where, self.content(name, road))

        return step

    def content(self, name: str, road: Any) -> Any:
        self.made.append(f"{road.folder.path.name} {name}")
        if name == "plan":
            depth = self.layers(road.config.model.path)
            dropped = self.plan(len(depth), road.config.plan)
            return Plan.keeping(len(depth), [at for at in range(len(depth)) if at not in dropped]).model_dump()
        if name == "collect":
            write_json(road.folder / "cka.json", {})
        if name == "gate":
            entry = json.loads((road.folder / "plan.json").read_text())
            layers = self.layers(road.config.model.path)
            kept = [layers[at] for at in entry["kept"]]
            write_json(road.folder / "retrained.layers.json", kept)
            value = self.value(kept)
            counts = {"layers": len(kept), "parameters": 100 * len(kept)}
            return {"candidate": counts | dict.fromkeys(("perplexity", "accuracy", "word_error_rate"), value)}
        if name == "baseline":
            return {
                "original": {
                    "layers": DEPTH,
                    "parameters": 1200,
                    "perplexity": 10.0,
                    "accuracy": 0.5,
                    "word_error_rate": 0.25,
                }
            }
        return {}

    def layers(self, path: str) -> list[int]:
        known = Path(f"{path}.layers.json")
        return json.loads(known.read_text()) if known.exists() else list(range(DEPTH))

    def run(self) -> dict[str, Any]:
        with open_run(self.folder, self.config.to_yaml()) as folder:
            rounds.prune_in_rounds(self.road(self.config, folder))
        return json.loads((self.folder / "rounds.json").read_text())


def decisions(record: dict[str, Any]) -> list[tuple[int, int, int, bool]]:
    """Of each round: layers that it kept, the round that it began from, its stride, whether it was accepted."""
    return [(len(entry["kept"]), entry["base"], entry["stride"], entry["accepted"]) for entry in record["rounds"]]
