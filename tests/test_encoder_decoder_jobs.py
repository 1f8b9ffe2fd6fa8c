"""What workers do with an encoder-decoder beyond the plain road: ways to train it, and classifiers of two stacks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from collecting import collected
from conftest import make_tokenizer
from encoder_decoders import BART_SIZES, T5, make
from ranks import on_ranks
from safetensors.torch import load_file

from mpruner_dist.cluster.worker import Worker
from mpruner_dist.config import Config
from mpruner_dist.data.labelled import LabelledTexts
from mpruner_dist.data.pairs import Pairs
from mpruner_dist.data.parts import save_part
from mpruner_dist.errors import StageFailure
from mpruner_dist.plan import Plan
from mpruner_dist.retraining.freezing import beside_gaps
from mpruner_dist.retraining.job import retrain_job
from mpruner_dist.rewriting.rewrite import rewrite_checkpoint

KEPT = [0, 1, 3, 4, 5, 7, 8]  # of five and four: the third of the encoder goes, and the second of the decoder
PARTS = ("calibration", "train", "validation", "test")


def config_for(task: str, model: Path, **sections: Any) -> Config:
    data = {part: {"path": f"{part}.txt"} for part in PARTS}
    return Config.model_validate({"model": {"path": str(model), "task": task}, "data": data, **sections})


def some_pairs(count: int, seed: int) -> Pairs:
    draw = np.random.default_rng(seed)
    lengths, target_lengths = draw.integers(3, 9, count), draw.integers(3, 7, count)
    ids, target_ids = draw.integers(3, 124, (count, 8)), draw.integers(3, 124, (count, 6))
    target_ids[:, 0] = 0
    return Pairs(*(value.astype(np.int32) for value in (ids, lengths, target_ids, target_lengths)))


def worker_in(folder: Path, stage: str) -> Worker:
    (folder / "logs").mkdir(parents=True)
    return Worker(0, 1, 0, 1, "cpu", folder / "logs", stage)


def retrain(folder: Path, name: str, layers: list[int] | None, **options: Any) -> list[float]:
    """Train on this rank; the losses of the steps."""
    run, steps = folder / name, {"steps": 3, "batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 0}
    config = config_for("sequence-to-sequence", folder / "model", retrain=steps | options)
    retrain_job(worker_in(run, "retrain"), {
        "config": config, "pruned": folder / "pruned", "layers": layers, "words": None, "teacher": folder / "model",
        "teacher_layers": KEPT, "train": folder / "train.safetensors", "work": run / "work",
        "validation": folder / "validation.safetensors", "target": run / "retrained", "deepspeed": {},
    })  # fmt: skip
    entries = [json.loads(line) for line in (run / "work/metrics.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if "loss" in entry]


def train_in_all_ways(folder: Path) -> None:
    losses = {
        "plain": retrain(folder, "plain", None),
        "checkpointed": retrain(folder, "checkpointed", None, activation_checkpointing=True),
        "neighbours": retrain(folder, "neighbours", beside_gaps(KEPT, [5, 4]), trainable="neighbours"),
        "lora": retrain(folder, "lora", None, lora={"rank": 4}),
        "distilled": retrain(folder, "distilled", None, distillation={"weight": 1.0, "top_k": 8}),
    }
    (folder / "losses.json").write_text(json.dumps(losses))


def changed(folder: Path, name: str) -> set[str]:
    before, after = (load_file(folder / where / "model.safetensors") for where in ("pruned", f"{name}/retrained"))
    return {tensor for tensor, value in before.items() if not torch.equal(value, after[tensor])}


def test_a_t5_is_trained_in_every_way(tmp_path: Path) -> None:
    make(T5, tmp_path / "model")
    rewrite_checkpoint(tmp_path / "model", tmp_path / "pruned", Plan.keeping(9, KEPT))
    save_part(tmp_path / "train.safetensors", some_pairs(4, 0))  # each step has all of them
    save_part(tmp_path / "validation.safetensors", some_pairs(3, 1))
    on_ranks(1, train_in_all_ways, tmp_path)
    losses = json.loads((tmp_path / "losses.json").read_text())
    assert losses["checkpointed"] == pytest.approx(losses["plain"], rel=1e-6)
    assert losses["neighbours"][0] == pytest.approx(losses["plain"][0], rel=1e-6)  # of the pruned model itself
    assert all(after < before for before, _, after in (losses["plain"], losses["distilled"]))
    every = set(load_file(tmp_path / "pruned/model.safetensors"))
    assert changed(tmp_path, "plain") == changed(tmp_path, "checkpointed") == every
    gaps = [f"encoder.block.{layer}." for layer in (1, 2)] + [f"decoder.block.{layer}." for layer in (0, 1)]
    assert changed(tmp_path, "neighbours") == {name for name in every if name.startswith(tuple(gaps))}
    by_lora = changed(tmp_path, "lora")
    assert by_lora
    assert all(".block." in name and "layer_norm" not in name for name in by_lora)
    assert any(name.startswith("decoder") for name in by_lora)
    assert any(name.startswith("encoder") for name in by_lora)


def test_classifiers_of_two_stacks_are_measured_on_one_text(tmp_path: Path) -> None:
    """The decoder's tokens are those of the text, shifted by the model itself."""
    for kind, config, whole in (
        ("bart", transformers.BartConfig(**BART_SIZES), transformers.BartForSequenceClassification),
        ("t5", T5, transformers.T5ForSequenceClassification),
    ):
        torch.manual_seed(0)
        whole(config).save_pretrained(tmp_path / kind / "model")
        make_tokenizer(tmp_path / kind / "model")
    draw = np.random.default_rng(0)
    ids, lengths = draw.integers(3, 124, (12, 9)).astype(np.int32), draw.integers(5, 9, 12).astype(np.int32)
    for row, length in enumerate(lengths):
        ids[row, length - 1 :] = [2] + [0] * (9 - length)  # BART says the class at the end of the text
    save_part(tmp_path / "texts.safetensors", LabelledTexts(ids, lengths, np.zeros(12, np.int32)))
    for kind in ("bart", "t5"):
        names = [f"layer {number}" for number in range(9)]
        config = config_for(
            "text-classification", tmp_path / kind / "model",
            collect={"batch_size": 6, "num_batches": 2, "samples": 16, "outlier_norm": None},
        )  # fmt: skip
        found = collected(tmp_path / kind / "sums", 1, config, tmp_path / "texts.safetensors", names)
        cka = np.array(found["cka"], float)
        assert np.isfinite(cka[:5, :5]).all()
        assert np.isfinite(cka[5:, 5:]).all()
        assert np.isnan(cka[:5, 5:]).all()
        assert found["num_samples"] == 32


def test_states_at_other_positions_than_the_tokens_are_noticed() -> None:
    """As of families that pad texts inside to a whole number of windows."""
    from mpruner_dist.config import CollectConfig
    from mpruner_dist.similarity.samples import draw_samples
    from mpruner_dist.similarity.tap import BatchStatistics, LayerTap

    block = torch.nn.Identity()
    tap = LayerTap(torch.nn.ModuleList([block]))
    config = CollectConfig(samples=8, batch_size=2)
    samples = draw_samples(torch.ones(2, 11), config, 0)
    tap.begin([BatchStatistics(0, samples, config, 1)])
    with pytest.raises(StageFailure, match="a block has states at 16 positions of texts of 11 tokens"):
        block(torch.randn(2, 16, 4))
