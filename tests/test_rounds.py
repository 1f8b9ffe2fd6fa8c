"""Rounds: what they decide, where they begin and why they end; and a whole loop on a small model."""

from pathlib import Path
from typing import Any

import pytest
from round_loop import DEPTH, decisions, make_config

from mpruner_dist import pipeline, rounds
from mpruner_dist.config import Config
from mpruner_dist.errors import Fruitless, NoneFits, Preempted, StageFailure, UserError
from mpruner_dist.reporting.rounds import round_rows, rounds_figure, rounds_summary
from mpruner_dist.reporting.status import status_of_rounds
from mpruner_dist.runs.folder import RunFolder, open_run


def test_accepted_rounds_go_on_from_the_result_and_rejected_ones_from_the_last_accepted(loop: Any) -> None:
    """At stride 1 each round removes layers 2, 4, 6...; ten percent are ten layers' worth of tenths."""
    made = loop(tolerance=0.06)
    record = made.run()
    assert decisions(record)[:3] == [(7, 0, 1, True), (4, 1, 1, False), (5, 1, 2, False)]
    assert record["rounds"][0]["removed"] == [2, 4, 6, 8, 10]
    # the second round's layers are told by their numbers in the original
    assert record["rounds"][1]["removed"] == [3, 7, 11]
    assert set(record["rounds"][1]["kept"]) < set(record["rounds"][0]["kept"])
    assert record["rounds"][1]["why"] == "perplexity 10.00 -> 10.80, +8.0 %, where at most +6 % is tolerated"
    assert "at stride 3" in record["stopped"]


def test_a_round_from_the_same_model_takes_over_its_similarities(loop: Any) -> None:
    made = loop(tolerance=0.06)
    made.run()
    assert [line for line in made.made if "collect" in line] == ["round-01 collect", "round-02 collect"]
    assert (made.folder / "round-03/collect.json").exists()


def test_the_same_command_again_makes_nothing_and_decides_the_same(loop: Any) -> None:
    made = loop(tolerance=0.06)
    first = made.run()
    made.made.clear()
    assert made.run() == first
    assert made.made == []


def test_interrupted_it_goes_on_where_it_was(loop: Any) -> None:
    undisturbed = loop(tolerance=0.06)
    expected = undisturbed.run()
    made = loop(tolerance=0.06)
    made.folder = made.folder.with_name("interrupted")
    value, calls = made.value, []

    def stop_in_the_second_round(kept: list[int]) -> float:
        calls.append(kept)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return value(kept)

    made.value = stop_in_the_second_round
    with pytest.raises(KeyboardInterrupt):
        made.run()
    made.value = value
    record = made.run()
    for one, other in zip(record["rounds"], expected["rounds"], strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_without_retraining_a_round_goes_on_that_was_stopped_in_it(loop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = loop(max_rounds=1)
    content = made.content

    def stop() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(made, "content", lambda name, road: content(name, road) if name != "retrain" else stop())
        with pytest.raises(KeyboardInterrupt):
            made.run()
    made.config = made.config.model_copy(update={"retrain": None})
    assert made.run()["rounds"][0]["seconds"] >= 0


def test_a_round_whose_training_comes_to_nothing_is_rolled_back_and_not_trained_again(loop: Any) -> None:
    """Nor where the run was killed before the decision was written."""
    made = loop(tolerance=0.5, max_rounds=3)
    content, trained = made.content, []

    def diverge(name: str, road: Any) -> Any:
        if name == "retrain" and road.folder.path.name == "round-02":
            trained.append(name)
            raise Fruitless("the loss of step 3 is not finite")
        return content(name, road)

    made.content = diverge
    record = made.run()
    assert decisions(record) == [(7, 0, 1, True), (4, 1, 1, False), (5, 1, 2, True)]
    assert record["rounds"][1]["why"] == "the loss of step 3 is not finite"
    assert round_rows(record)[1][-1] == "rolled back: the loss of step 3 is not finite"
    assert dict(status_of_rounds(made.folder))["round-02 retrain"] == "given up: the loss of step 3 is not finite"
    assert "<svg" in rounds_figure(record)
    (made.folder / "rounds.json").unlink()
    assert made.run() == record
    assert trained == ["retrain"]


@pytest.mark.parametrize("stage", ["plan", "rewrite"])
def test_a_round_whose_plan_the_model_cannot_take_is_rolled_back(loop: Any, stage: str) -> None:
    """With a pattern to keep, an odd number of layers may not do where an even one does."""
    made = loop(tolerance=0.5, max_rounds=3)
    content = made.content

    def refuse(name: str, road: Any) -> Any:
        if name == stage and road.folder.path.name == "round-02":
            raise NoneFits("no 4 layers keep the pattern of kinds")
        return content(name, road)

    made.content = refuse
    record = made.run()
    assert decisions(record) == [(7, 0, 1, True), (7 if stage == "plan" else 4, 1, 1, False), (5, 1, 2, True)]
    assert record["rounds"][1]["why"] == "no 4 layers keep the pattern of kinds"
    assert round_rows(record)[1][3:5] == (("", "7") if stage == "plan" else ("3, 7, 11", "4"))
    assert "<svg" in rounds_figure(record)
    assert made.run() == record


def test_when_the_evaluation_is_asked_for_otherwise_only_the_gates_are_made_anew(loop: Any) -> None:
    made = loop(tolerance=0.06, max_rounds=2)
    record = made.run()
    step = rounds.ROUND_STEPS["gate"]

    def with_batches_of_two(road: Any) -> Any:
        inputs, outputs, make = step(road)
        return inputs | {"evaluate": {"batch_size": 2}}, outputs, make

    rounds.ROUND_STEPS["gate"] = with_batches_of_two
    made.made.clear()
    again = made.run()
    assert made.made == ["round-01 gate", "round-02 gate"]
    assert decisions(again) == decisions(record)


def test_a_round_whose_model_has_no_finite_loss_is_rolled_back_without_retraining_too(loop: Any) -> None:
    made = loop(tolerance=0.5, max_rounds=1)
    made.config = made.config.model_copy(update={"retrain": None})

    def value(kept: list[int]) -> float:
        raise Fruitless("the model's loss on the text is not finite")

    made.value = value
    assert made.run()["rounds"][0]["why"] == "the model's loss on the text is not finite"


def test_a_round_that_was_given_up_is_refused_to_other_training(loop: Any) -> None:
    made = loop(tolerance=0.5, max_rounds=1)
    content = made.content

    def fail(name: str, road: Any) -> Any:
        if name == "retrain":
            raise Fruitless("nothing moved")
        return content(name, road)

    made.content = fail
    assert made.run()["rounds"][0]["why"] == "nothing moved"
    folder = RunFolder(made.folder / "round-01", "")
    with pytest.raises(UserError, match="model: was 'original', is 'another'"):
        folder.stage("retrain", {"model": "another"}, (), lambda: None, remedy="")


@pytest.mark.parametrize("error", [StageFailure, Preempted, OSError])
def test_any_other_failure_of_training_ends_the_run_and_is_tried_again(loop: Any, error: type[Exception]) -> None:
    made = loop(tolerance=0.5, max_rounds=1)
    content = made.content
    made.content = lambda name, road: content(name, road) if name != "retrain" else fail(error)

    def fail(error: type[Exception]) -> None:
        raise error("a lost worker, a full disk, a signal")

    with pytest.raises(error):
        made.run()
    made.content = content
    assert decisions(made.run()) == [(7, 0, 1, True)]


def test_a_first_round_beyond_the_tolerance_keeps_the_original_and_says_so(loop: Any, caplog: Any) -> None:
    made = loop(tolerance=0.001)
    with caplog.at_level("WARNING", "mpruner_dist"):
        record = made.run()
    assert [entry["accepted"] for entry in record["rounds"]] == [False, False, False]
    assert [entry["base"] for entry in record["rounds"]] == [0, 0, 0]
    assert "no round was accepted: the original is kept as it is" in caplog.text
    assert rounds_summary(record | {"metric": "perplexity"})[0].startswith("No round was accepted")


def test_clusters_of_single_layers_end_it(loop: Any) -> None:
    made = loop()
    made.plan = lambda depth, plan: [1] if depth == DEPTH else []
    record = made.run()
    assert decisions(record) == [(11, 0, 1, True)]
    assert record["stopped"] == "no layers are alike enough: every cluster is a single layer"


def test_layers_that_are_alike_and_always_stay_end_it(loop: Any) -> None:
    made = loop(max_rounds=1)
    made.plan = lambda depth, plan: []
    content = made.content
    alike = {"clusters": [[10, 11]]}
    made.content = lambda name, road: content(name, road) | (alike if name == "plan" else {})
    assert made.run()["stopped"].startswith("the layers that are alike always stay, by the stride, by plan.protect")


def test_a_plan_that_was_rolled_back_is_not_trained_again(loop: Any) -> None:
    """Clusters of two layers lose the same one at every stride."""
    made = loop(tolerance=0.001)
    made.plan = lambda depth, plan: [3]
    record = made.run()
    assert [entry.get("metric") for entry in record["rounds"]] == [pytest.approx(10.1), None, None]
    assert record["rounds"][1]["why"] == "the plan is that of a round that was rolled back"
    assert [line for line in made.made if "retrain" in line] == ["round-01 retrain"]


def test_max_rounds_end_it(loop: Any) -> None:
    made = loop(tolerance=10.0, max_rounds=1)
    assert made.run()["stopped"] == "rounds.max_rounds: 1 rounds are done"


def test_the_budget_ends_it(loop: Any) -> None:
    made = loop(tolerance=10.0, plan={"method": "partition", "keep_layers": 9}, remove=2)
    made.plan = lambda depth, plan: list(range(1, 1 + depth - plan.keep_layers))
    record = made.run()
    assert decisions(record) == [(10, 0, 1, True), (9, 1, 1, True)]
    assert record["stopped"] == "the budget is reached: 9 layers are left"


def test_a_method_with_a_budget_removes_less_after_each_roll_back(loop: Any) -> None:
    made = loop(tolerance=0.025, plan={"method": "partition", "keep_layers": 9}, remove=5)
    made.plan = lambda depth, plan: list(range(1, 1 + depth - plan.keep_layers))
    record = made.run()
    # twelve layers; five would leave seven, but nine are the budget; then three, then two
    assert decisions(record) == [(9, 0, 1, False), (9, 0, 2, False), (10, 0, 3, True), (9, 3, 3, False)]
    assert record["rounds"][1]["why"] == "the plan is that of a round that was rolled back"


@pytest.mark.parametrize("keep", [DEPTH, DEPTH + 1])
def test_a_budget_that_no_round_can_reach_is_refused(loop: Any, keep: int) -> None:
    with pytest.raises(UserError, match=f"rounds end at {keep} layers, and the model has only 12"):
        loop(plan={"method": "anchor", "keep_layers": keep}).run()


def test_rounds_end_before_the_first_layer_of_a_stage_goes(loop: Any) -> None:
    made = loop(tolerance=10.0, plan={"method": "partition", "keep_layers": 3, "protect_last": 0}, remove=4)
    made.stacks = {"one": 2, "two": 1, "three": 2, "four": 2, "five": 1}
    made.plan = lambda depth, plan: list(range(1, 1 + depth - plan.keep_layers))
    record = made.run()
    assert [len(entry["kept"]) for entry in record["rounds"]] == [8]
    assert record["stopped"].startswith("8 layers are left, 5 of which always stay")
    assert "round-01 result" not in made.made
    assert any(line.endswith("result") for line in made.made)


def test_it_ends_where_each_stack_has_one_layer_left(loop: Any) -> None:
    made = loop(tolerance=10.0, plan={"method": "chain", "protect_first": 0, "protect_last": 0})
    made.stacks = {"encoder": 6, "decoder": 6}
    made.plan = lambda depth, plan: [layer for layer in range(depth) if layer % (depth // 2)]
    record = made.run()
    assert [entry["kept"] for entry in record["rounds"]] == [[0, 6]]
    assert record["stopped"] == "one layer is left in each of the 2 stacks"
    assert not any(line.startswith("round-02") for line in made.made)


def test_another_configuration_is_refused_with_the_way_out(loop: Any) -> None:
    made = loop(tolerance=0.06)
    made.run()
    made.config = made.config.model_copy(update={"model": made.config.model.model_copy(update={"path": "another"})})
    with pytest.raises(UserError, match=r"model: was 'original', is 'another'\n.*mpruner evaluate CONFIG"):
        made.run()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": {"tolerance": 0}}, "greater than 0"),
        ({"rounds": {"tolerance": 0.1, "metric": "task"}}, "metric task and rounds.task go together"),
        ({"plan": {"method": "file", "file": "plan.json"}}, "plan.method file gives only one"),
        ({"plan": {"method": "partition", "keep_layers": 9}}, "must be given as rounds.remove"),
        ({"rounds": {"tolerance": 0.1, "remove": 2}}, "is decided by plan.threshold"),
        ({"plan": {"method": "anchor", "stride": 2}}, "leave plan.stride 2 out"),
        ({"plan": {"method": "chain", "keep": "medoid"}}, "rounds.max_stride must be 1"),
        (
            {"plan": {"method": "last", "keep_layers": 1}, "rounds": {"tolerance": 0.1, "remove": 2}},
            "the 2 layers of plan.protect_first and plan.protect_last always stay",
        ),
        ({"data": {"calibration": {"path": "a.txt"}, "test": {"path": "b.txt"}}, "retrain": None}, "data.validation"),
    ],
)
def test_configurations_that_make_no_rounds(changes: dict[str, Any], message: str) -> None:
    content = make_config().model_dump(mode="json") | changes
    with pytest.raises(ValueError, match=message):
        Config.model_validate(content)


def test_a_folder_is_either_of_rounds_or_of_a_road_walked_once(tmp_path: Path) -> None:
    """Both make plan.json: the one would go on from the other's."""
    in_rounds = make_config()
    once = in_rounds.model_copy(update={"rounds": None})
    for first, stage, second in ((once, "collect", in_rounds), (in_rounds, "baseline", once)):
        run = tmp_path / stage
        with open_run(run, first.to_yaml()) as folder:
            folder.stage(stage, {}, (), lambda: None, remedy="")
        with pytest.raises(UserError, match=f"holds the stage {stage} of a run .* rounds: give a new --run-dir"):
            pipeline.run(second, run)
