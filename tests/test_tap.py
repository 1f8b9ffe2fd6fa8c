"""What hooks on real blocks make of a forward pass.

Shape suffixes: N samples, D features, L layers, S = L + 1 states.
"""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tapped_model import (
    LAYERS,
    Model,
    at,
    by_hand,
    config,
    drawn,
    inputs,
    tapped,
    unit_size,
)
from torch import Tensor

from mpruner_dist.errors import StageFailure
from mpruner_dist.models.stacks import run_blocks
from mpruner_dist.similarity.finalise import angular_distance, block_influence, cka, top_share, updates_cka
from mpruner_dist.similarity.hsic import cka_matrix
from mpruner_dist.similarity.samples import Samples, draw_samples
from mpruner_dist.similarity.sums import Terms
from mpruner_dist.similarity.tap import BatchStatistics, LayerTap


@pytest.fixture(params=[1, 3], ids=["as on CPUs", "as on GPUs"], autouse=True)
def together(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many layers are measured together."""
    for module in ("tap", "estimators", "hsic"):
        monkeypatch.setattr(f"mpruner_dist.similarity.{module}.layers_at_once", lambda *_: request.param)


@pytest.mark.parametrize("in_tuple", [False, True], ids=["tensor", "tuple"])
@pytest.mark.parametrize("normalize", [False, True])
def test_cka_of_states_and_updates_is_that_of_the_selected_vectors(in_tuple: bool, normalize: bool) -> None:
    model, settings = Model(in_tuple), config(normalize=normalize)
    terms = tapped(model, settings, drawn(settings))
    states = by_hand(model, drawn(settings).positions_N)
    updates = [after - before for before, after in itertools.pairwise(states)]
    scaled = unit_size if normalize else (lambda vectors: vectors)
    expected = cka_matrix([scaled(state) for state in states[1:]]).numpy()
    assert np.abs(cka(terms) - expected).max() < 1e-5
    expected = cka_matrix([scaled(update) for update in updates]).numpy()
    assert np.abs(updates_cka(terms) - expected).max() < 1e-5
    assert np.abs(updates_cka(terms) - cka(terms)).max() > 0.1
    assert terms["samples"] == 16


def test_influence_and_angles_are_those_of_the_selected_vectors() -> None:
    model, settings = Model(), config(samples=57)  # all that there are
    samples = drawn(settings)
    terms = tapped(model, settings, samples)
    states = by_hand(model, samples.positions_N)
    cosine = torch.nn.functional.cosine_similarity
    for layer in range(LAYERS):
        expected = 1 - cosine(states[layer], states[layer + 1]).mean()
        assert block_influence(terms)[layer] == pytest.approx(float(expected), abs=1e-6)
    angles = angular_distance(terms)
    for one in range(LAYERS + 1):
        for other in range(LAYERS + 1):
            expected = cosine(states[one], states[other]).clamp(-1, 1).arccos().mean() / math.pi
            assert angles[one, other] == pytest.approx(float(expected) if one != other else 0.0, abs=1e-6)
    assert terms["angle_samples"] == 57  # 57 * 57 // 24 would be more than there are
    few = tapped(model, config(samples=16), drawn(config(samples=16)))
    assert few["angle_samples"] == 16 * 16 // 24


def test_angles_of_a_wide_model_take_no_more_memory_than_the_grams() -> None:
    statistics = BatchStatistics(0, at(list(range(16))), config(), 2)
    for _ in range(2):
        statistics.observe(torch.randn(16, 40), torch.randn(16, 40))
    assert [len(state) for state in statistics.states_MD] == [4, 4, 4]  # 16 * 16 // 160 would be too few


def test_top_share_is_what_the_largest_hundredth_holds() -> None:
    model, settings = Model(), config(normalize=False, outlier_norm=None)
    model.layers[1].spoil = (7, 30.0)
    terms = tapped(model, settings, at(list(range(5, 30))))
    with torch.no_grad():
        states = by_hand(model, torch.arange(5, 30))
    clean = states[1] - states[1].mean(0)
    energies = (clean**2).sum(1)
    assert top_share(terms)[0] == pytest.approx(float(energies.max() / energies.sum()), abs=1e-6)
    assert top_share(terms)[1] > 0.9
    assert top_share(tapped(Model(), settings, at(list(range(5, 30)))))[1] < 0.3


def test_an_outlier_in_one_layer_is_left_out_of_all() -> None:
    model, settings = Model(), config(normalize=False)
    samples = drawn(settings)
    model.layers[2].spoil = (int(samples.positions_N[4]), 1000.0)
    terms = tapped(model, settings, samples)
    left = torch.cat([samples.positions_N[:4], samples.positions_N[5:]])
    assert terms["samples"] == 15
    clean = tapped(Model(), settings, Samples("token", left, samples.eligible_BT, samples.seed))
    assert np.abs(cka(terms) - cka(clean)).max() < 1e-5
    np.testing.assert_allclose(block_influence(terms), block_influence(clean), atol=1e-6)
    np.testing.assert_allclose(angular_distance(terms), angular_distance(clean), atol=1e-6)
    with_it = tapped(model, config(normalize=False, outlier_norm=None), samples)
    assert top_share(with_it)[2] > 0.9
    assert np.abs(cka(with_it) - cka(clean))[2].max() > 0.2


def test_too_many_outliers_are_an_error() -> None:
    model = Model()
    for layer, token in enumerate([2, 4]):
        model.layers[layer].spoil = (token, 1000.0)
    with pytest.raises(
        StageFailure, match=r"batch 5: 3 samples are left after the norm outliers, 4 needed: raise coll"
    ):
        tapped(model, config(), at([1, 2, 3, 4, 5]))
    assert tapped(model, config(), at([1, 2, 3, 4, 5, 6, 7, 8]))["samples"] == 6


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layer", [0, 3])
def test_activations_that_are_not_finite_name_layer_batch_and_share(layer: int, value: float) -> None:
    model = Model()
    model.layers[layer].spoil = (7, value)
    with pytest.raises(StageFailure, match=rf"batch 5: 10\.0% of the sampled activations of layer {layer} are not fin"):
        tapped(model, config(), at(list(range(10))))
    model = Model()
    model.layers[layer].spoil = (7, value)
    assert tapped(model, config(), at(list(range(8, 18))))["samples"] == 10  # it was not drawn and does no harm


def test_constant_features_name_layer_and_batch() -> None:
    statistics = BatchStatistics(5, at(list(range(16))), config(), 2)
    statistics.observe(torch.randn(16, 6), torch.randn(16, 6))
    statistics.observe(torch.randn(16, 6), torch.full((16, 6), 0.3))
    with pytest.raises(StageFailure, match=r"batch 5: the activations of layer 1 are the same for every sample"):
        statistics.terms()


def test_a_pass_that_missed_blocks_or_ran_twice_is_refused() -> None:
    model = Model()
    tap = LayerTap(model.layers)
    statistics = BatchStatistics(5, at(list(range(10))), config(), LAYERS)
    tap.begin([statistics])
    model.layers[0](inputs())
    with pytest.raises(StageFailure, match="batch 5: 1 blocks ran, the model has 4"):
        statistics.terms()
    model.layers[0](inputs())
    with pytest.raises(StageFailure, match="batch 5: more than 4 blocks ran"):
        model(inputs())


def test_without_batches_nothing_is_kept_and_close_removes_the_hooks() -> None:
    model = Model()
    tap = LayerTap(model.layers)
    model(inputs())
    assert tap.inputs == []
    statistics = BatchStatistics(5, at(list(range(10))), config(), LAYERS)
    tap.begin([statistics])
    tap.close()
    model(inputs())
    assert statistics.seen == 0
    assert all(not block._forward_hooks and not block._forward_pre_hooks for block in model.layers)


def test_several_batches_in_one_pass_are_what_they_are_alone() -> None:
    model, settings = Model(), config()
    tap = LayerTap(model.layers)
    both = [
        BatchStatistics(5, drawn(settings), settings, LAYERS),
        BatchStatistics(6, at([*range(9)]), settings, LAYERS),
    ]
    tap.begin(both)
    with torch.no_grad():
        model(torch.cat([inputs(), inputs().flip(0)]))
    tap.close()
    alone = tapped(model, settings, drawn(settings))
    for name, value in both[0].terms().items():
        np.testing.assert_allclose(value, alone[name], rtol=1e-4, atol=1e-6 * np.abs(alone[name]).max(), err_msg=name)
    assert both[1].terms()["samples"] == 9


def test_low_precision_states_are_compared_in_float32() -> None:
    model = Model().bfloat16()
    tap = LayerTap(model.layers)
    statistics = BatchStatistics(5, at(list(range(10))), config(), LAYERS)
    tap.begin([statistics])
    with torch.no_grad():
        model(inputs().bfloat16())
    terms = statistics.terms()
    assert all(value.dtype == torch.float64 and torch.isfinite(value).all() for value in terms.values())


def one_pass(model: torch.nn.Module, blocks: torch.nn.ModuleList, mask: Tensor, unit: str, **given: Any) -> Terms:
    """Terms of one pass of a vision model."""
    settings = config(unit="image", skip_tokens=0, samples=16)
    statistics = BatchStatistics(0, draw_samples(mask, settings, 0), settings, len(blocks))
    tap = LayerTap(blocks)
    tap.begin([statistics])
    with torch.no_grad():
        model(**given)
    tap.close()
    return {name: value.numpy() for name, value in statistics.terms().items()}


def test_images_of_a_vision_transformer() -> None:
    torch.manual_seed(0)
    vit = transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=16,
            patch_size=4,
        )
    ).eval()
    pixels = torch.randn(8, 3, 16, 16)
    blocks = run_blocks(vit)
    terms = one_pass(vit, blocks, torch.ones(8, 17), "image", pixel_values=pixels)
    with torch.no_grad():
        states = vit(pixels, output_hidden_states=True).hidden_states[1:]
    samples = draw_samples(torch.ones(8, 17), config(unit="image", skip_tokens=0, samples=16), 0)
    vectors = [unit_size(samples.take(state).double()) for state in states]
    assert terms["samples"] == 8
    # the last hidden state that transformers returns has gone through the final norm: compare the ones before
    assert np.abs(cka(terms)[:2, :2] - cka_matrix(vectors[:2]).numpy()).max() < 1e-5


def test_images_of_a_convolutional_stage() -> None:
    torch.manual_seed(0)
    settings = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16], depths=[3], layer_type="basic", downsample_in_first_stage=False
    )
    resnet = transformers.ResNetModel(settings).eval()
    blocks = torch.nn.ModuleList(resnet.encoder.stages[0].layers)
    terms = one_pass(resnet, blocks, torch.ones(8, 64), "image", pixel_values=torch.randn(8, 3, 32, 32))
    matrix = cka(terms)
    assert terms["samples"] == 8
    assert matrix.shape == (3, 3)
    assert 0.2 < matrix[0, 1] < 0.9999


@pytest.mark.parametrize("estimator", ["debiased", "biased", "sentence"])
def test_layers_measured_together_are_what_they_are_alone(estimator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stage of another width, whose first layer has no update, and with an outlier."""
    draw = torch.Generator().manual_seed(0)
    states = [torch.randn(16, width, generator=draw) for width in (6, 6, 6, 6, 9, 9, 9)]
    states[2][5] *= 1000
    found = []
    for count in (1, 2, 100):
        for module in ("tap", "estimators", "hsic"):
            monkeypatch.setattr(f"mpruner_dist.similarity.{module}.layers_at_once", lambda *_, count=count: count)
        statistics = BatchStatistics(0, at(list(range(16))), config(estimator=estimator), len(states) - 1)
        for before, after in itertools.pairwise(states):
            statistics.observe(before, after)
        found.append(statistics.terms())
    assert found[0]["samples"] == 15
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, value in found[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
