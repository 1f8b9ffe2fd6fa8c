"""The whole road on a small Whisper, with real DeepSpeed; and what it says beside transformers alone."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from conftest import write_config
from ranks import on_ranks
from speech_models import (
    DECODER,
    ENCODER,
    IDLE,
    SAID,
    config_of,
    make_recordings,
    read,
    settings,
)

from mpruner_dist.cluster.settings import inference_settings
from mpruner_dist.cluster.worker import Worker
from mpruner_dist.data.parts import load_part, save_part
from mpruner_dist.evaluation.generation import generate
from mpruner_dist.models.engines import inference_engine
from mpruner_dist.models.scoring import score_part
from mpruner_dist.tasks import task_of

Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speech")
    make_recordings(folder)
    return folder


def test_a_whisper_is_pruned_in_rounds_that_its_word_error_rate_judges(
    folder: Path, tmp_path: Path, without_ray: Run
) -> None:
    asked = settings(folder) | {
        "rounds": {"metric": "word_error_rate", "tolerance": 0.3, "remove": 2, "max_stride": 1, "max_rounds": 2}
    }
    run = tmp_path / "run"
    code, output = without_ray("run", write_config(tmp_path / "config.yaml", asked), "--run-dir", run)
    assert code == 0, output
    rounds = json.loads((run / "rounds.json").read_text())
    before = rounds["original"]["word_error_rate"]
    assert before <= 1 / SAID + 1e-6  # it is free to say a word more than it was asked for
    assert rounds["worst"] == pytest.approx(before + 0.3)
    [first] = rounds["rounds"]
    assert first["removed"] == IDLE
    assert first["accepted"]
    assert "where a rise of at most 30 points is tolerated" in first["why"]
    similarity = json.loads((run / "round-01/cka.json").read_text())
    assert similarity["stacks"] == {"model.encoder.layers": ENCODER, "model.decoder.layers": DECODER}
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert [evaluation[label]["layers"] for label in ("original", "pruned", "retrained")] == [7, 5, 5]
    assert evaluation["original"]["word_error_rate"] <= 1 / SAID + 1e-6
    assert evaluation["original"]["chrf"] > 0.9
    kept = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(run / "retrained").config
    assert (kept.encoder_layers, kept.decoder_layers) == (ENCODER - 1, DECODER - 1)
    page = (run / "report.html").read_text()
    assert "word error rate" in page
    assert "<th>recordings</th>" in page
    assert "AutoProcessor.from_pretrained(folder)" in (run / "retrained/README.md").read_text()


def divided(folder: Path, part: Path, results: Path) -> None:
    """On each of two ranks: score and generate with the weights divided among them."""
    worker = Worker(torch.distributed.get_rank(), 2, 0, 2, "cpu", results, "evaluate")
    config = config_of(folder, evaluate={"batch_size": 2})
    engine = inference_engine(inference_settings({}, 3, "float32"), folder / "model", config.model, worker.log)
    score = score_part(worker, engine, task_of(config.model), load_part(part), 2)
    said = generate(worker, engine, load_part(part), config, worker.tell)
    (results / f"{worker.rank}.json").write_text(json.dumps([score.loss, score.predictions, said.tolist()]))


def test_loss_and_words_are_those_of_transformers_alone(folder: Path, tmp_path: Path) -> None:
    """More batches on one rank than on the other; the language, which is given, is no prediction."""
    part = read(folder, folder / "list.jsonl", 9)
    save_part(tmp_path / "part.safetensors", part)
    on_ranks(2, divided, folder, tmp_path / "part.safetensors", tmp_path)
    loss, predictions, said = json.loads((tmp_path / "0.json").read_text())
    assert [loss, predictions, said] == json.loads((tmp_path / "1.json").read_text())
    model = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(folder / "model").eval()
    features, targets = torch.from_numpy(part.features), torch.from_numpy(part.target_ids).long()
    with torch.no_grad():
        logits = model(input_features=features, decoder_input_ids=targets[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits[:, 1:].flatten(0, 1), targets[:, 2:].flatten())
    assert loss == pytest.approx(float(expected), rel=1e-5)
    assert predictions == 9 * (SAID + 1)
    for row in range(len(part)):
        alone = transformers.GenerationMixin.generate(
            model, input_features=features[row : row + 1], decoder_input_ids=torch.tensor([[1, 2]]), do_sample=False,
            max_new_tokens=SAID + 1,
        )[0, 2:].tolist()  # fmt: skip
        assert said[row] == alone + [0] * (SAID + 1 - len(alone))
