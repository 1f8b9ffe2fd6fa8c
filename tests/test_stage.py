"""`cka.json`: everything that the saved sums say, and when they say enough."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpruner_dist.config import CollectConfig
from mpruner_dist.errors import StageFailure
from mpruner_dist.planning.clusters import open_decisions
from mpruner_dist.similarity.finalise import angular_distance, block_influence, cka, updates_cka
from mpruner_dist.similarity.samples import draw_samples
from mpruner_dist.similarity.stage import is_settled, write_cka
from mpruner_dist.similarity.sums import BatchSums
from mpruner_dist.similarity.tap import BatchStatistics

LAYERS, SAMPLES, WIDTH = 4, 32, 16
NAMES = [f"model.layers.{layer}" for layer in range(LAYERS)]


def measured_sums(batches: int, *, steps: tuple[float, ...] = (1.0, 0.2, 0.2, 1.0), **changes: Any) -> BatchSums:
    """Batches of a made-up model; `steps` says how much each of its blocks changes the states."""
    config = CollectConfig(**{"samples": SAMPLES, "estimator": "debiased"} | changes)
    sums = BatchSums()
    for batch in range(batches):
        draw = torch.Generator().manual_seed(batch)
        statistics = BatchStatistics(batch, draw_samples(torch.ones(2, 40), config, batch), config, len(steps))
        states = torch.randn(SAMPLES, WIDTH, generator=draw)
        for step in steps:
            after = states + step * torch.randn(SAMPLES, WIDTH, generator=draw)
            statistics.observe(states, after)
            states = after
        sums.update(batch, {name: value.numpy() for name, value in statistics.terms().items()})
    return sums


@pytest.mark.parametrize("estimator", ["debiased", "biased", "sentence", "feature"])
def test_write_cka_reduces_the_folder_to_one_file(tmp_path: Path, estimator: str) -> None:
    sums = measured_sums(6, estimator=estimator)
    sums.before(2).save(tmp_path / "stats")
    BatchSums({batch: sums.terms[batch] for batch in (5, 2, 3, 4)}).save(tmp_path / "stats")
    config = CollectConfig(samples=SAMPLES, estimator=estimator, num_batches=8)
    content = write_cka(tmp_path / "stats", NAMES, tmp_path / "cka.json", config)
    total = sums.total()
    assert content["layers"] == NAMES
    assert content["cka"] == cka(total).tolist()
    assert content["stderr"] == sums.jackknife(cka).tolist()
    assert content["updates"]["cka"] == updates_cka(total).tolist()
    assert content["updates"]["stderr"] == sums.jackknife(updates_cka).tolist()
    assert content["block_influence"] == block_influence(total).tolist()
    assert content["block_influence_stderr"] == sums.jackknife(block_influence).tolist()
    assert content["angular_distance"] == angular_distance(total).tolist()
    assert np.shape(content["angular_distance_stderr"]) == (LAYERS + 1, LAYERS + 1)
    assert (content["num_batches"], content["asked_batches"], content["num_samples"]) == (6, 8, 6 * SAMPLES)
    assert content["open"] is None
    assert content["unit"] == "token"
    assert content["null"]["permutations"] == (1 if estimator == "feature" else 4)
    assert content["null"]["mean"] < content["null"]["quantile"] < content["cka"][1][2]
    assert content["dominated"] == []


def test_one_batch_has_values_and_no_errors(tmp_path: Path) -> None:
    measured_sums(1).save(tmp_path)
    content = write_cka(tmp_path, NAMES, tmp_path / "cka.json", CollectConfig())
    assert content["stderr"] is content["updates"]["stderr"] is content["block_influence_stderr"] is None
    assert np.isfinite(content["cka"]).all()


def test_an_idle_block_is_null_among_the_updates_alone(tmp_path: Path) -> None:
    measured_sums(3, steps=(1.0, 0.0, 0.2, 1.0)).save(tmp_path)
    content = write_cka(tmp_path, NAMES, tmp_path / "cka.json", CollectConfig())
    assert content["updates"]["cka"][1] == [None] * LAYERS
    assert content["updates"]["cka"][0][1] is None
    assert content["updates"]["cka"][0][2] is not None
    assert content["cka"][0][1] == pytest.approx(1.0, abs=1e-6)
    assert content["block_influence"][1] == pytest.approx(0.0, abs=1e-6)


def test_a_layer_where_few_tokens_dominate_is_named(tmp_path: Path) -> None:
    config = CollectConfig(samples=SAMPLES, normalize=False, outlier_norm=None)
    sums = BatchSums()
    for batch in range(2):
        statistics = BatchStatistics(batch, draw_samples(torch.ones(2, 40), config, batch), config, LAYERS)
        for layer in range(LAYERS):
            states = torch.randn(SAMPLES, WIDTH, generator=torch.Generator().manual_seed(batch))
            states[3] *= 100.0 if layer == 2 else 1.0
            statistics.observe(torch.ones(SAMPLES, WIDTH), states)
        sums.update(batch, {name: value.numpy() for name, value in statistics.terms().items()})
    sums.save(tmp_path)
    content = write_cka(tmp_path, NAMES, tmp_path / "cka.json", config)
    assert content["dominated"] == ["model.layers.2"]
    assert content["top_share"][2] > 0.9


def decisions(threshold: float) -> Any:
    return partial(open_decisions, threshold=threshold, standard_errors=2.0)


def test_it_is_settled_when_no_comparison_is_near_the_threshold(tmp_path: Path) -> None:
    sums = measured_sums(12)
    level = float(cka(sums.total())[0, 1])
    far, near = decisions(0.5), decisions(level)
    assert is_settled(sums, "states", far)
    assert not is_settled(sums, "states", near)
    assert not is_settled(sums.before(1), "states", far)  # no error bar, nothing is settled
    sums.save(tmp_path)
    config = CollectConfig(samples=SAMPLES, num_batches=20)
    assert write_cka(tmp_path, NAMES, tmp_path / "cka.json", config, "states", far)["open"] == []
    assert write_cka(tmp_path, NAMES, tmp_path / "cka.json", config, "states", near)["open"] == [[0, 1]]


def test_updates_may_be_what_is_to_be_settled() -> None:
    """Updates here are unrelated: their CKA is far below a threshold that the states come near."""
    sums = measured_sums(12)
    level = float(cka(sums.total())[0, 1])
    assert is_settled(sums, "updates", decisions(level))
    assert not is_settled(sums, "states", decisions(level))
    idle = measured_sums(12, steps=(1.0, 0.0, 0.2, 1.0))
    assert not is_settled(idle, "updates", decisions(0.5))  # what is unknown is not settled


def test_a_layer_without_positive_hsic_reaches_no_file(tmp_path: Path) -> None:
    sums = measured_sums(3)
    for terms in sums.terms.values():
        terms["states.hsic"][2, 2] = -1e-3
    sums.save(tmp_path)
    with pytest.raises(StageFailure, match=r"the HSIC of layer 2 with itself is -0\.003"):
        write_cka(tmp_path, NAMES, tmp_path / "cka.json", CollectConfig())
    assert not (tmp_path / "cka.json").exists()
