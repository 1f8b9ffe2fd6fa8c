import html
import json
import re

import pytest
from finished_run import DEPTH, STAGES, edit, make_config, make_run, similarities

from mpruner_dist.config import Config
from mpruner_dist.plan import Plan
from mpruner_dist.reporting.figures import neighbours_figure, similarity_figure
from mpruner_dist.reporting.report import write_report
from mpruner_dist.reporting.similarity import window_rows
from mpruner_dist.reporting.table import change_text, duration_text, parameters_text, perplexity_text
from mpruner_dist.reporting.training import training
from mpruner_dist.runs.digest import file_digest

SECTIONS = ["Result", "Similarity of the layers", "What was removed, and why", "Retraining", "Data", "The run"]


def test_the_report_has_every_section_in_order_and_the_numbers(tmp_path):
    write_report(make_run(tmp_path), make_config(), STAGES)
    page = html.unescape((tmp_path / "report.html").read_text())
    assert re.findall("<h2>(.*?)</h2>", page) == SECTIONS
    assert (
        "6 → 4 layers, 1.00 B → 800.0 M parameters (-20.0 %), perplexity 10.00 → 20.00 pruned → 11.00 retrained "
        "on 1,234 held-out tokens."
    ) in page
    for expected in ("+100.0 %", "+10.0 %", "0.9800", "± 0.0010", "7 min 05 s", "keep_layers: 4", "fair reference"):
        assert expected in page
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "cka.svg", "updates.svg", "neighbours.svg", "influence.svg", "losses.svg",
    }  # fmt: skip


def test_the_report_is_self_contained_and_names_no_path_of_this_machine(tmp_path):
    write_report(make_run(tmp_path), make_config(), STAGES)
    page = (tmp_path / "report.html").read_text()
    assert re.findall(r'(?:src|href)\s*=\s*"(?!data:)[^"]*', page) == []
    assert not re.search(r"@import|url\(|<script|<link", page)
    assert str(tmp_path) not in page


def test_names_from_outside_are_escaped(tmp_path):
    config = make_config(model={"path": "models/<script>alert(1)<"})
    run = make_run(tmp_path)
    edit(run / "plan.json", lambda plan: plan.update(reasons={"2": "<b>I say so</b>"}))
    write_report(run, config, STAGES)
    for name in ("report.html", "pruned/README.md"):
        assert "<script" not in (run / name).read_text()
        assert "<b>" not in (run / name).read_text()
        assert "&lt;script&gt;alert(1)&lt;" in (run / name).read_text()


def test_a_run_without_retraining(tmp_path):
    run = make_run(tmp_path, retrain=False)
    (run / "retrained").mkdir()  # left by an earlier run with retraining
    (run / "retrain.json").write_text("of an earlier run")
    write_report(run, make_config(retrain=False), STAGES)
    page = (run / "report.html").read_text()
    assert re.findall("<h2>(.*?)</h2>", page) == [name for name in SECTIONS if name != "Retraining"]
    assert "fair reference" not in page
    assert not list((run / "retrained").iterdir())
    assert "Retraining" not in (run / "pruned/README.md").read_text()


def test_records_in_two_parts_are_told_and_the_test_is_not_called_held_out(tmp_path):
    run = make_run(tmp_path)
    edit(run / "data/data.json", lambda data: data["parts"]["test"].update(records_also_in={"train": 3}))
    write_report(run, make_config(), STAGES)
    for name in ("report.html", "pruned/README.md"):
        assert "3 records of test also stand in train." in (run / name).read_text()
        assert "held-out" not in (run / name).read_text()


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"method": "anchor", "threshold": 0.9, "stride": 2}, "at least 0.9. Of the layers 0, 1, 2, ... of each"),
        ({"method": "partition", "target_parameters": 900_000_000}, "at most 900.0 M parameters"),
        ({"method": "file", "file": "mine.json"}, "the plan is mine.json"),
        ({"method": "chain", "keep": "last"}, "is at least 0.98. Of each cluster its last layer stays."),
        (
            {"method": "anchor", "keep": "last", "stride": 2},
            "Of the others, counted from there, the 1st, 3rd, 5th",
        ),
        (
            {"method": "complete", "keep": "medoid", "keep_layers": 4},
            "a threshold, the highest that lets enough layers",
        ),
        (
            {"method": "influence", "keep_layers": 4},
            "Method influence, with a budget of 4 layers: the layers",
        ),
        ({"method": "angular", "keep_layers": 4}, "that turns the states least, by the angle"),
        ({"method": "last", "keep_layers": 4}, "the last layers that may go"),
        ({"method": "random", "keep_layers": 4}, "drawn at random"),
        ({"method": "search", "keep_layers": 4}, "improved by swaps while forward passes were left"),
    ],
)
def test_the_method_is_told_in_words(tmp_path, plan, words):
    write_report(make_run(tmp_path), make_config(plan=plan), STAGES)
    assert words in (tmp_path / "report.html").read_text()
    assert words in (tmp_path / "pruned/README.md").read_text()


def test_a_judged_plan_tells_its_losses_and_never_speaks_of_similarity(tmp_path):
    run = make_run(tmp_path)
    judged = {"passes": 9.5, "tokens": 4321, "loss_of_the_whole_model": 2.5, "loss": 2.75}
    why = {"2": {"step": 1, "loss_before": 2.5, "loss_after": 2.625}, "4": "another"}
    edit(run / "plan.json", lambda plan: plan.update(method="greedy", judged=judged, reasons=why))
    write_report(run, make_config(plan={"method": "greedy", "keep_layers": 4}), STAGES)
    for name in ("report.html", "pruned/README.md"):
        text = (run / name).read_text()
        assert "Judged on 4,321 tokens of validation text in 9.5 forward passes" in text
        assert "loss 2.5000 with all layers, 2.7500 without these" in text
        assert "loss before, nats" in text
        assert "resembles layer" not in text
    assert "<td>2</td><td>1</td><td>2.5000</td><td>2.6250</td>" in (run / "report.html").read_text()
    card = (run / "pruned/README.md").read_text()
    assert "| 4 | another |" in card
    assert "nearly the same as a layer that was kept" not in card
    assert "least loss on validation data" in card


def test_a_comparison_is_shown_while_it_is_of_these_similarities(tmp_path):
    run = make_run(tmp_path)
    entry = {"1": {"dropped": [2], "passes": 3.0, "loss": 2.0}, "2": {"dropped": None, "refused": "no", "loss": None}}
    content = {
        "layers": 6, "depths": [1, 2], "judged_on_tokens": 10, "held_out_tokens": 2345, "loss_of_the_whole_model": 1.0,
        "planners": {"search": entry, "last": entry | {"2": {"dropped": [3, 4], "passes": 0, "loss": 3.0}}},
        "cka": file_digest(run / "cka.json"),
    }  # fmt: skip
    (run / "compare.json").write_text(json.dumps(content))
    write_report(run, make_config(), STAGES)
    page = (run / "report.html").read_text()
    assert "<td>search</td><td>7.39 *</td><td>refused</td><td>0</td>" in page
    assert "<td>last</td><td>7.39 *</td><td>20.09 *</td><td>0</td>" in page
    assert "2,345 tokens of validation text that no planner saw (2.72 with all layers)" in page
    assert (run / "figures/plans.svg").exists()
    (run / "compare.json").write_text(json.dumps(content | {"cka": "of another run"}))
    write_report(run, make_config(), STAGES)
    assert "no planner saw" not in (run / "report.html").read_text()


def test_a_plan_by_hand_and_a_single_batch(tmp_path):
    run = make_run(tmp_path)
    unknown = dict.fromkeys(("stderr", "block_influence_stderr", "angular_distance_stderr"))
    edit(run / "cka.json", lambda cka: cka.update(num_batches=1, updates=cka["updates"] | {"stderr": None}, **unknown))
    edit(run / "plan.json", lambda plan: plan.update(clusters=[], reasons={"4": {"like": 3, "cka": 0.98}}))
    write_report(run, make_config(), STAGES)
    page = (run / "report.html").read_text()
    assert "not stated" in page
    assert "a single batch has no spread" in page
    assert "± 0" not in page


def test_the_report_tells_everything_that_one_pass_measured(tmp_path):
    write_report(make_run(tmp_path), make_config(plan={"method": "anchor"}), STAGES)
    page = html.unescape((tmp_path / "report.html").read_text())
    for expected in (
        "<td>3</td><td>0.0200 ± 0.0100</td><td>0.9802 ± 0.0010</td><td>0.9802 ± 0.0010</td><td>2.0%</td>",
        "<td>2</td><td>2-3</td><td>0.0100 ± 0.0001</td>",
        "CKA is 0.0013 on average and below 0.0456 in 99%",
        "would score 0.0013 on average and\nless than 0.0456 in 99\xa0% of the pairs",
        "estimator: linear CKA, of some kind",
    ):
        assert expected in page
    assert "dominate" not in page


def test_no_window_is_longer_than_its_stack(tmp_path):
    run = make_run(tmp_path)
    similarity = json.loads((run / "cka.json").read_text())
    assert [row[0] for row in window_rows(similarity)] == ["1", "2", "3"]
    assert [row[0] for row in window_rows(similarity | {"stacks": {"a": 2, "b": 2, "c": 2}})] == ["1", "2"]


def test_the_saving_of_a_settled_collection_is_told(tmp_path):
    config = make_config(plan={"method": "anchor"}, collect={"until": "settled", "settled_z": 2.5})
    run = make_run(tmp_path)
    edit(run / "cka.json", lambda cka: cka.update(open=[]))
    write_report(run, config, STAGES)
    for name in ("report.html", "pruned/README.md"):
        text = (run / name).read_text()
        assert "settled after 4 of 8 batches: every comparison of the clusters lies more than 2.5 standard" in text
        assert "50% of the work was saved" in text
    edit(run / "cka.json", lambda cka: cka.update(open=[[0, 2], [3, 4]], num_batches=8))
    write_report(run, config, STAGES)
    assert (
        "not settled after all 8 batches: the CKA of layers 0 and 2, 3 and 4 lies" in (run / "report.html").read_text()
    )


def test_layers_where_few_tokens_dominate_are_named(tmp_path):
    run = make_run(tmp_path)
    names = [f"model.layers.{layer}" for layer in (2, 3, 5)]
    edit(run / "cka.json", lambda cka: cka.update(dominated=names, top_share=[0.02, 0.02, 0.3, 0.93, 0.02, 0.5]))
    write_report(run, make_config(), STAGES)
    page = (run / "report.html").read_text()
    assert "In layers 2-3, 5 few tokens dominate: the largest one in a hundred tokens of a batch hold up to 93%" in page


def test_updates_that_do_not_vary_are_unknown(tmp_path):
    run = make_run(tmp_path)

    def idle(cka):
        for matrix in cka["updates"].values():
            for layer in range(DEPTH):
                matrix[1][layer] = matrix[layer][1] = None

    edit(run / "cka.json", idle)
    write_report(run, make_config(), STAGES)
    page = html.unescape((run / "report.html").read_text())
    assert "<td>0.9802 ± 0.0010</td><td>unknown</td>" in page
    assert ">nan" not in page


@pytest.mark.parametrize("depth", [2, 12, 80, 126])
def test_figures_of_any_depth_are_small_and_the_same_again(depth):
    cka, stderr = similarities(depth)
    cka[0, 1] = cka[1, 0] = 1.0001  # an unbiased estimate may
    plan = Plan.keeping(depth, [0, *range(2, depth)], clusters=[[0, 1]])
    assert similarity_figure(cka, plan) == similarity_figure(cka, plan)
    assert len(similarity_figure(cka, plan)) < 200_000
    assert len(neighbours_figure(cka, stderr, plan, threshold=1.0)) < 200_000


def test_numbers_are_short():
    assert [parameters_text(n) for n in (134_515_008, 70_553_706_496)] == ["134.5 M", "70.55 B"]
    assert [perplexity_text(p) for p in (16.6115, 1e304)] == ["16.61", "1e+304"]
    assert [change_text(*pair) for pair in ((9, 10), (1230, 100))] == ["-10.0 %", "12.3-fold"]
    assert [duration_text(s) for s in (0.23, 59.97, 425, 12000)] == ["0.2 s", "1 min 00 s", "7 min 05 s", "3 h 20 min"]


def test_speeds_on_other_workers_are_not_compared(tmp_path):
    run = make_run(tmp_path)
    edit(run / "evaluation.json", lambda evaluation: evaluation["pruned"].update(tokens_per_second=20.0))
    write_report(run, make_config(), {})
    report = " ".join((run / "report.html").read_text().split())
    assert "Speed is measured in the evaluation itself, on 1 worker (cpu): one pass" in report
    assert "+100.0 %" in report
    edit(run / "evaluation.json", lambda evaluation: evaluation["pruned"].update(workers=2))
    edit(run / "evaluation.json", lambda evaluation: evaluation["pruned"].update(perplexity=10.1))
    write_report(run, make_config(), {})
    report = " ".join((run / "report.html").read_text().split())
    assert "1 worker (cpu) for original, 2 workers (cpu) for pruned, 1 worker (cpu) for retrained, which does" in report
    assert "+100.0 %" not in report


def lines_of_training(weights=None, **retrain) -> str:
    config = make_config().model_dump() | {"retrain": {"steps": 30, **retrain}}
    data = {"packed": True, "parts": {"train": {"blocks": 2}}}
    return "\n".join(training(Config.model_validate(config), data, weights))


def test_the_report_tells_how_it_was_trained():
    plain = lines_of_training()
    assert "LoRA" not in plain
    assert "distillation" not in plain
    counts = {
        "trained_tensors": 4, "trained_parameters": 3_000_000, "changed_tensors": 3, "frozen_tensors": 7,
        "frozen_parameters": 9_000_000, "proved_tensors": 7,
    }  # fmt: skip
    told = lines_of_training(
        counts, trainable="neighbours", lora={"rank": 7, "targets": ["q_proj", "v_proj"]},
        distillation={"weight": 0.25, "top_k": 9, "hidden_weight": 0.5, "teacher": "owner/bigger"},
    )  # fmt: skip
    for expected in (
        "adapters of rank 7, alpha 32, dropout 0, on q_proj, v_proj; merged",
        "only the layers beside a gap",
        "4 tensors (3.0 M parameters) were to change and 3 of them did; 7 (9.0 M) are byte for byte",
        "distillation from owner/bigger: predictions over its 9 likeliest words and all others as one, weight 0.25, "
        "temperature 1; hidden states of the kept layers, weight 0.5; the training loss holds all terms",
    ):
        assert expected in told
    cached = lines_of_training(distillation={"top_k": 9, "cache": True})
    assert "distillation from the original model: predictions over" in cached
    assert "asked once before the training" in cached
