"""What a round may lose by each metric, and of what no share can be taken."""

from typing import Any

import pytest

from mpruner_dist.errors import UserError


def test_accuracy_is_judged_by_difference(loop: Any) -> None:
    made = loop(tolerance=0.02, metric="accuracy", max_rounds=2)
    values = iter([0.49, 0.47])
    made.value = lambda kept: next(values)
    record = made.run()
    assert [entry["accepted"] for entry in record["rounds"]] == [True, False]
    assert record["rounds"][1]["why"] == (
        "accuracy 50.00 % -> 47.00 %, -3.00 points, where a loss of at most 2 points is tolerated"
    )


def test_what_is_lost_may_be_all_that_is_tolerated(loop: Any) -> None:
    made = loop(tolerance=0.02, metric="accuracy", max_rounds=2)
    values = iter([0.48, 0.4799])  # 0.5 - 0.48 is 0.020000000000000018
    made.value = lambda kept: next(values)
    assert [entry["accepted"] for entry in made.run()["rounds"]] == [True, False]


def test_a_word_error_rate_is_judged_by_how_much_it_rises(loop: Any) -> None:
    speech = "automatic-speech-recognition"
    made = loop(tolerance=0.02, metric="word_error_rate", model_task=speech, max_rounds=2)
    values = iter([0.2, 0.28])
    made.value = lambda kept: next(values)
    record = made.run()
    assert [entry["accepted"] for entry in record["rounds"]] == [True, False]
    assert record["worst"] == pytest.approx(0.27)
    why = "word_error_rate 25.00 % -> 28.00 %, +3.00 points, where a rise of at most 2 points is tolerated"
    assert record["rounds"][1]["why"] == why


@pytest.mark.parametrize("value", [0.0, -1.5])
def test_a_task_of_whose_value_no_share_can_be_taken_is_refused(loop: Any, value: float) -> None:
    made = loop(tolerance=0.02, metric="task", task={"name": "quiz"})
    content = made.content
    of_task = {"task": value, "task_metric": "bits", "task_less_is_better": True}

    def baseline(name: str, road: Any) -> Any:
        return {"original": content(name, road)["original"] | of_task} if name == "baseline" else content(name, road)

    made.content = baseline
    with pytest.raises(
        UserError, match=f"bits of the task quiz is {value:g} for the original.*another rounds.task.metric"
    ):
        made.run()
