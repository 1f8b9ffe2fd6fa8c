"""The benchmark of recipes: what it says of made-up measures, and what it runs; the runs themselves are pretended."""

import json
from pathlib import Path
from typing import Any

import pytest
import recipe_runs
import yaml
from recipe_tables import PUBLISHED, Found, Outcome, published_table, result_table, spread, verdict

from mpruner_dist.config import Config
from mpruner_dist.config.task import FACTS
from mpruner_dist.config_file import load_config
from mpruner_dist.errors import Fruitless, UserError
from mpruner_dist.plan import Plan
from mpruner_dist.runs.commit import write_json

DEPTH, SIZE = 8, 100
IMAGES = "image-classification"


def entry(layers: int, accuracy: float, rate: float = 100.0, **more: Any) -> dict[str, Any]:
    size = {"layers": layers, "parameters": 200_000 + 100_000 * layers, "bytes": 800_000 + 400_000 * layers}
    return size | {"loss": 2 - accuracy, "accuracy": accuracy, "macro_f1": accuracy, "images_per_second": rate} | more


def outcome(layers: int, retrained: float, **more: Any) -> Outcome:
    evaluation = {
        "original": entry(DEPTH, 0.9, **more),
        "pruned": entry(layers, 0.3, **more),
        "retrained": entry(layers, retrained, rate=150.0, **more),
    }
    return Outcome(evaluation, (DEPTH * SIZE, layers * SIZE), 60.0)


def found(layers: int, recipe: tuple[float, float], last: tuple[float, float]) -> Found:
    return {
        "recipe": {seed: outcome(layers, value) for seed, value in enumerate(recipe)},
        "last": {seed: outcome(layers, value) for seed, value in enumerate(last)},
        "original": {seed: outcome(DEPTH, 0.92) for seed in range(2)},
    }


def test_a_row_has_means_and_deviations_over_the_seeds() -> None:
    lines = result_table(found(4, (0.89, 0.91), (0.5, 0.5)), IMAGES).splitlines()
    columns = [part.strip() for part in lines[0].strip("|").split("|")]
    row = dict(zip(columns, (part.strip() for part in lines[2].strip("|").split("|")), strict=True))
    assert row == {
        "": "recipe", "seeds": "2", "blocks": "8 → 4", "parameters, M": "1.000 → 0.600 (-40.0 %)",
        "in the blocks": "-50.0 %", "bytes, MB": "4.000 → 2.400",
        "accuracy, %": "90.00 ± 0.00 → 30.00 ± 0.00 → 90.00 ± 1.41",
        "macro F1, %": "90.00 ± 0.00 → 30.00 ± 0.00 → 90.00 ± 1.41",
        "loss": "1.1000 ± 0.0000 → 1.7000 ± 0.0000 → 1.1000 ± 0.0141", "speed": "1.50 ± 0.00", "seconds": "60",
    }  # fmt: skip
    assert lines[1].count("|") == lines[2].count("|") == len(columns) + 1
    assert [line.split("|")[1].strip() for line in lines[3:]] == ["last", "original"]


def test_memory_is_shown_where_it_was_measured() -> None:
    table = result_table({"recipe": {0: outcome(4, 0.9, gpu_bytes=5_000_000)}}, IMAGES)
    assert "GPU memory, MB" in table
    assert "| 5.000 → 5.000 |" in table


def test_depths_that_differ_between_seeds_and_results_of_another() -> None:
    other = Outcome(outcome(5, 0.8).evaluation, (800, 500), None)
    table = result_table({"recipe": {0: outcome(4, 0.9)}, "last": {0: other, 1: outcome(4, 0.8)}}, IMAGES)
    assert "| last | 2 | 8 → 4.5 |" in table
    assert table.count("| 60 |") == 2
    assert result_table({"recipe": {0: other}}, IMAGES).endswith("| none of its own |")


def test_targets_that_are_met() -> None:
    told = verdict(found(3, (0.89, 0.90), (0.5, 0.6)), IMAGES, is_cnn=True)
    assert told == (
        "Targets: at least 50 % of the blocks' parameters removed: 62.5 %, met; at most 1 point of accuracy lost on "
        "average: -0.50 points (-2.50 points to the original retrained alike), met; of a CNN less than 3.5 points at "
        "-47 % of all parameters: -0.50 points at -50.0 %, met; never worse than a baseline at equal depth: last "
        "-34.50 points, met."
    )


def test_targets_that_are_missed_say_so() -> None:
    told = verdict(found(5, (0.85, 0.85), (0.851, 0.852)), IMAGES, is_cnn=True).split("; ")
    assert [target.rstrip(".").endswith("**missed**") for target in told] == [True] * 4
    assert told[0].endswith("37.5 %, **missed**")
    assert told[3].endswith("last +0.15 points, **missed**.")
    told = verdict(found(3, (0.861, 0.861), (0.5, 0.5)), IMAGES, is_cnn=True).split("; ")
    assert ["missed" in target for target in told] == [False, True, True, False]
    assert len(verdict(found(3, (0.9, 0.9), (0.5, 0.5)), IMAGES, is_cnn=False).split("; ")) == 3


def test_baselines_are_compared_on_the_seeds_that_both_have() -> None:
    some = found(4, (0.9, 0.6), (0.8, 0.8))
    assert "last +5.00 points, **missed**" in verdict(some, IMAGES, is_cnn=False)
    del some["last"][1]
    assert "last -10.00 points, met" in verdict(some, IMAGES, is_cnn=False)
    del some["last"]
    assert "at equal depth: none was run, not judged." in verdict(some, IMAGES, is_cnn=False)


def test_of_perplexity_less_is_better() -> None:
    def of(perplexity: float) -> dict[int, Outcome]:
        evaluation = outcome(4, 0.5).evaluation
        for label, value in (("original", 10.0), ("pruned", 1.2345e7), ("retrained", perplexity)):
            evaluation[label] |= {"perplexity": value, "tokens_per_second": 1.0}
        return {0: Outcome(evaluation, (800, 400), 1.0)}

    better = verdict({"recipe": of(11.0), "last": of(22.0)}, "causal-lm", is_cnn=False)
    assert "does not apply to perplexity, which changed by +10.00 %" in better
    assert "last +100.00 %, met" in better
    assert "**missed**" in verdict({"recipe": of(11.0), "last": of(10.0)}, "causal-lm", is_cnn=False)
    assert "| 10.00 → 1.23e+07 → 11.00 |" in result_table({"recipe": of(11.0)}, "causal-lm")


def test_a_run_without_an_accepted_round_counts_as_the_original() -> None:
    rejected = Outcome({"original": entry(DEPTH, 0.9)}, (800, 800), 60.0)
    assert "| 8 → 8 | 1.000 → 1.000 (+0.0 %) |" in result_table({"recipe": {0: rejected}}, IMAGES)
    assert "0.0 %, **missed**" in verdict({"recipe": {0: rejected}}, IMAGES, is_cnn=False)


def test_one_seed_has_no_deviation() -> None:
    assert spread([0.5]) == "0.50"


def test_the_published_rows_agree_with_what_is_said_of_them() -> None:
    """-3.5 points at -47 %, the T5 of half the size."""
    rows = published_table(IMAGES).splitlines()
    assert rows[4].endswith("| 50 → 26 | 60.193 → 31.709 (-47.3 %) | top-1 76.82 → 73.37 | -3.45 points |")
    assert len(rows) == 4 + len(PUBLISHED[IMAGES])
    assert "222.904 → 109.630 (-50.8 %)" in published_table("sequence-to-sequence")
    assert published_table("causal-lm") == "Nothing is published of a network for causal-lm."
    assert PUBLISHED.keys() == FACTS.keys()


class Runs:
    """In the place of `pipeline.run`: writes plans, and measures where a run goes on to its end."""

    def __init__(self, accepted: tuple[bool, ...] = ()) -> None:
        self.accepted = accepted
        self.trained: list[str] = []
        self.configs: dict[str, Config] = {}
        self.collected: dict[str, str] = {}

    def __call__(self, config: Config, folder: Path, last: str = "", collected: Path | None = None) -> Path:
        name, plan = folder.name, config.plan
        self.configs[name] = config
        if collected is not None:
            self.collected[name] = collected.relative_to(folder.parent).as_posix()
        kept = {"influence": [0, 1, 2, 7], "random": [0, 1, 2, 6]}.get(plan.method, [0, 1, 2, 3])
        if plan.file:
            kept = json.loads(plan.file.read_text())["kept"]
        if config.rounds and not any(self.accepted):
            kept = list(range(DEPTH))
        write_json(folder / "cka.json", {"layers": [f"layers.{layer}" for layer in range(DEPTH)]})
        write_json(folder / "plan.json", Plan.keeping(DEPTH, kept).model_dump())
        write_json(folder / "manifest.json", {"version": 1, "stages": {"plan": {"seconds": 2.0}}})
        if last != "plan":
            if plan.method == "random":
                raise Fruitless("the loss is not finite")
            self.trained.append(name)
            write_json(folder / "evaluation.json", outcome(4, 0.9).evaluation)
            if config.rounds:
                write_json(folder / "rounds.json", {"rounds": [{"accepted": was} for was in self.accepted]})
        return folder


def recipe_file(folder: Path, monkeypatch: pytest.MonkeyPatch, runs: Runs, **changes: Any) -> Path:
    monkeypatch.setattr(recipe_runs, "run", runs)
    monkeypatch.setattr(recipe_runs, "original", lambda config: None)
    monkeypatch.setattr(recipe_runs, "layer_parameters", lambda checkpoint, layers: [SIZE] * len(layers))
    text = {"path": "text.jsonl", "take": [0, 1]}
    content = {
        "model": {"path": "model", "task": "text-classification"},
        "data": {part: text | {"split": part} for part in ("calibration", "train", "validation", "test")},
        "plan": {"method": "search", "target_parameters": 1000},
        "retrain": {"steps": 20, "trainable": "neighbours"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content | changes))
    return folder / "recipe.yaml"


def test_baselines_have_the_depth_the_training_and_the_similarities(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Runs()
    file = recipe_file(tmp_path, monkeypatch, runs)
    measured = recipe_runs.measure(file, tmp_path, [3, 5], list(recipe_runs.BASELINES))
    assert runs.trained == [
        "recipe-seed3", "influence-seed3", "original-seed3", "recipe-seed5", "influence-seed5", "original-seed5",
    ]  # fmt: skip
    config = runs.configs["influence-seed5"]
    assert (config.collect.seed, config.plan.seed, config.retrain and config.retrain.seed) == (5, 5, 5)
    assert (config.plan.keep_layers, config.plan.target_parameters) == (4, None)
    assert config.retrain == runs.configs["recipe-seed5"].retrain
    assert set(runs.collected.values()) == {"recipe-seed3", "recipe-seed5"}
    of_original = runs.configs["original-seed5"].retrain
    assert of_original is not None
    assert (of_original.steps, of_original.trainable) == (20, "all")
    assert json.loads((tmp_path / "original.json").read_text())["dropped"] == []
    # last has the plan of the recipe
    assert (tmp_path / "last-seed3/evaluation.json").resolve() == tmp_path / "recipe-seed3/evaluation.json"
    assert measured.found["last"][3].seconds is None
    assert measured.found["influence"][3] == Outcome(outcome(4, 0.9).evaluation, (800, 400), 2.0)
    assert measured.found["random"] == {}
    assert measured.notes[:2] == [
        "seed 3: last has the plan, and the result, of recipe-seed3",
        "seed 3: random came to nothing and is left out: the loss is not finite",
    ]
    again = recipe_runs.measure(file, tmp_path, [3, 5], list(recipe_runs.BASELINES))
    assert again.found == measured.found


ROUNDS = {
    "rounds": {"metric": "accuracy", "tolerance": 0.01, "remove": 2, "max_stride": 1},
    "plan": {"method": "greedy", "keep_layers": 2},
}


def test_baselines_of_rounds_train_as_long_as_the_accepted_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Runs((True, False, True))
    file = recipe_file(tmp_path, monkeypatch, runs, **ROUNDS)
    measured = recipe_runs.measure(file, tmp_path, [0], ["last"])
    config = runs.configs["last-seed0"]
    assert config.rounds is None
    assert (config.plan.keep_layers, config.retrain and config.retrain.steps) == (4, 40)
    assert runs.collected["last-seed0"] == "recipe-seed0/round-01"
    assert "last-seed0" in runs.trained  # though it has the recipe's plan: that was trained in two rounds
    told = recipe_runs.caption(file, load_config(file, []), measured)
    assert "steps: 40 (seed 0)" in told
    assert "original has no gaps" not in told
    assert "not measured on CPUs" in told


def test_nothing_is_compared_where_nothing_was_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs((False,))
    file = recipe_file(tmp_path, monkeypatch, runs, **ROUNDS)
    measured = recipe_runs.measure(file, tmp_path, [0], ["last", "original"])
    assert runs.trained == ["recipe-seed0"]
    assert measured.notes == ["seed 0: no round was accepted, the recipe's result is the original itself"]


def test_a_recipe_without_retraining_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = recipe_file(tmp_path, monkeypatch, Runs(), retrain=None)
    with pytest.raises(UserError, match="no section retrain"):
        recipe_runs.measure(file, tmp_path, [0], [])


def test_seconds_are_those_of_all_rounds(tmp_path: Path) -> None:
    for folder, stages in {
        "": {"data": {"seconds": 1.0}, "report": {"state": "running"}},
        "round-01": {"collect": {"seconds": 30.0}, "retrain": {"seconds": 10.0}},
        "round-02": {"collect": {"seconds": 0.0}, "retrain": {"seconds": 11.0}},
    }.items():
        write_json(tmp_path / folder / "manifest.json", {"version": 1, "stages": stages})
    assert recipe_runs.seconds_of(tmp_path) == 52.0
