"""The whole road on a small encoder-decoder, with real Ray and real DeepSpeed; and its two stacks in one run."""

import json
import random
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import WORDS, make_tokenizer, settings_for, write_config
from encoder_decoders import DECODER, ENCODER, FAMILIES, IDLE, T5, make
from ranks import on_ranks
from safetensors.torch import load_file, save_file

from mpruner_dist.checkpoints.export import export_weights
from mpruner_dist.checkpoints.folder import read_checkpoint
from mpruner_dist.cluster.settings import inference_settings
from mpruner_dist.cluster.worker import Worker
from mpruner_dist.config import Config, RetrainConfig
from mpruner_dist.config.task import GENERATED
from mpruner_dist.data.model_folder import load_tokenizer
from mpruner_dist.data.pairs import Pairs, make_pairs
from mpruner_dist.data.parts import load_part, save_part
from mpruner_dist.data.readers import decoder_tokens, require_one_language
from mpruner_dist.errors import UserError
from mpruner_dist.evaluation.generation import COMPARE, generate, rouge_l
from mpruner_dist.models.blocks import skipped
from mpruner_dist.models.engines import inference_engine
from mpruner_dist.models.loading import load_model
from mpruner_dist.models.scoring import score_part
from mpruner_dist.models.stacks import run_blocks, run_stacks, series_of_blocks
from mpruner_dist.plan import Plan
from mpruner_dist.retraining.preparation import prepare_model, trainable
from mpruner_dist.rewriting.proof import verify_checkpoint
from mpruner_dist.rewriting.rewrite import rewrite_checkpoint
from mpruner_dist.tasks import task_of

Run = Callable[..., tuple[int, str]]
LENGTH = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5, and texts each with what the model itself says of it."""
    folder = tmp_path_factory.mktemp("pairs")
    model = make(T5, folder / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=LENGTH)) for _ in range(160)]
    ids = torch.tensor(tokenizer(texts)["input_ids"])
    said = model.generate(input_ids=ids, max_new_tokens=LENGTH, min_new_tokens=LENGTH, do_sample=False)[:, 1:]
    targets = tokenizer.batch_decode(said)
    lines = [json.dumps({"text": text, "said": target}) for text, target in zip(texts, targets, strict=True)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    return folder


def settings(folder: Path) -> dict[str, Any]:
    settings = settings_for(folder)
    settings["model"]["task"] = "sequence-to-sequence"
    for part in ("calibration", "train", "validation", "test"):
        settings["data"][part]["target_field"] = "said"
    settings["data"]["target_size"] = LENGTH
    settings["collect"] |= {
        "batch_size": 4, "samples": 4 * LENGTH, "skip_tokens": 0, "outlier_norm": None, "num_batches": 6
    }  # fmt: skip
    settings["retrain"] |= {"steps": 20, "batch_size": 8, "learning_rate": 1e-3, "save_every": 20}
    settings["plan"] = {"method": "search", "keep_layers": 6, "protect_first": 0, "protect_last": 0, "passes": 12}
    settings["evaluate"] = {"batch_size": 7, "max_blocks": 20}
    return settings


@pytest.mark.ray
def test_an_encoder_and_a_decoder_are_pruned_retrained_and_measured(folder: Path, tmp_path: Path, mpruner: Run) -> None:
    """Two workers; every token of the calibration counts, so that transformers alone gives the same influence."""
    config = write_config(tmp_path / "config.yaml", settings(folder))
    code, output = mpruner("run", config, "--run-dir", tmp_path / "run", "--set", "cluster.workers=2")
    assert code == 0, output
    run = tmp_path / "run"
    plan = json.loads((run / "plan.json").read_text())
    assert set(IDLE) < set(plan["dropped"])
    similarity = json.loads((run / "cka.json").read_text())
    assert similarity["stacks"] == {"encoder.block": ENCODER, "decoder.block": DECODER}
    assert similarity["layers"][ENCODER] == "decoder.block.0"
    assert similarity["cka"][0][ENCODER] is None  # they have no token in common
    assert similarity["cka"][ENCODER][-1] is not None
    assert similarity["block_influence"] == pytest.approx(influence(folder / "model", run), abs=1e-5)
    kept = json.loads((run / "pruned/layer_map.json").read_text())["stacks"]
    assert sum(len(stack["new_to_old"]) for stack in kept.values()) == 6
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["original"]["bleu"] == pytest.approx(1.0)
    assert evaluation["original"]["accuracy"] == 1.0
    assert evaluation["pruned"]["bleu"] < 0.9
    assert evaluation["retrained"]["loss"] < evaluation["pruned"]["loss"]
    assert [evaluation[label]["layers"] for label in ("original", "pruned", "retrained")] == [9, 6, 6]
    verify_checkpoint(run / "retrained")
    assert "BLEU" in output
    page = (run / "report.html").read_text()
    assert "BLEU 1.000" in page
    assert "encoder.block 2, decoder.block 2-3" in page


def influence(model_folder: Path, run: Path) -> list[float]:
    """1 - mean cosine of what goes into each block and what comes out, from transformers alone."""
    model = transformers.AutoModel.from_pretrained(model_folder).eval()
    part = load_part(run / "data/calibration.safetensors")
    taken: list[torch.Tensor] = []
    for block in (*model.encoder.block, *model.decoder.block):
        block.register_forward_hook(
            lambda _, args, output: taken.append(torch.cosine_similarity(args[0], output[0], -1))
        )
    with torch.no_grad():
        ids, said = (torch.from_numpy(some).long() for some in (part.ids, part.target_ids))
        model(input_ids=ids, decoder_input_ids=said[:, :-1], use_cache=False)
    return [1 - float(cosine.mean()) for cosine in taken]


@pytest.mark.parametrize("family", FAMILIES)
def test_skipped_blocks_are_as_if_rewritten(family: str, tmp_path: Path) -> None:
    model = make(FAMILIES[family], tmp_path / "model", [])
    stacks, series = run_stacks(model), series_of_blocks(model)
    assert [stack.depth for stack in stacks] == [len(blocks) for blocks in series] == [ENCODER, DECODER]
    dropped = [1, 2, 4, 8]  # two of the encoder are left, and three of the decoder
    plan = Plan.keeping(9, [layer for layer in range(9) if layer not in dropped])
    rewrite_checkpoint(tmp_path / "model", tmp_path / "small", plan)
    small = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "small").eval()
    ids, said = (torch.randint(3, 124, shape, generator=torch.Generator().manual_seed(1)) for shape in ((2, 7), (2, 5)))
    inputs = {"input_ids": ids, "decoder_input_ids": said, "use_cache": False}
    with torch.no_grad(), skipped(run_blocks(model), dropped):
        expected = model(**inputs).logits
    with torch.no_grad():
        torch.testing.assert_close(small(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
        said = [
            small.generate(input_ids=ids, max_new_tokens=6, do_sample=False, use_cache=use) for use in (True, False)
        ]
    assert said[0].tolist() == said[1].tolist()


OLD = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_a_tensor_of_the_first_t5_that_no_model_asks_for_is_kept(
    folder: Path, tmp_path: Path, lora: dict[str, Any] | None
) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    file = "model.safetensors"
    old = torch.randn(32, 4)
    save_file(load_file(tmp_path / "model" / file) | {OLD: old}, tmp_path / "model" / file, {"format": "pt"})
    rewrite_checkpoint(tmp_path / "model", tmp_path / "pruned", Plan.keeping(9, [0, 1, 2, 4, 6, 7, 8]))
    before = load_file(tmp_path / "pruned" / file)
    assert torch.equal(before[OLD], old)
    pruned = read_checkpoint(tmp_path / "pruned")
    model: Any = load_model(tmp_path / "pruned", "float32", kind="AutoModelForSeq2SeqLM")
    weights = prepare_model(model, pruned, RetrainConfig.model_validate({"lora": lora}), None)
    for parameter in trainable(model):
        parameter.data += 0.1
    counts = export_weights(weights, pruned, tmp_path / "out", lambda *_: nullcontext(), is_writer=True)
    after = load_file(tmp_path / "out" / file)
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert OLD in same
    assert len(before) - len(same) == counts.changed_tensors > 0
    assert lora is not None or same == {OLD}
    verify_checkpoint(tmp_path / "out")


@pytest.mark.parametrize("family", ["marian", "pegasus"])
def test_computed_positions_are_not_trained(family: str, tmp_path: Path) -> None:
    """Marian's lie in no file, so that what they learnt would be lost."""
    make(FAMILIES[family], tmp_path)
    model: Any = load_model(tmp_path, "float32", kind="AutoModelForSeq2SeqLM")
    weights = prepare_model(model, read_checkpoint(tmp_path), RetrainConfig(), None)
    assert weights.keys() == read_checkpoint(tmp_path).tensors.keys()
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight"]


def test_a_plan_for_another_number_of_layers_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the plan is for 8 layers, the model has 9"):
        rewrite_checkpoint(folder / "model", tmp_path / "small", Plan.keeping(8, [0, 4]))


def pairs(folder: Path, number: int) -> Pairs:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    draw = random.Random(1)
    texts = [[" ".join(draw.choices(WORDS, k=draw.randint(2, most))) for most in (9, 14)] for _ in range(number)]
    return make_pairs(((text, said) for text, said in texts), tokenizer, (8, 6), None, 0, 0)


def config_of(folder: Path) -> Config:
    return Config.model_validate(settings(folder))


def test_pairs_are_cut_padded_and_shifted(folder: Path) -> None:
    part = pairs(folder / "model", 20)
    assert part.ids.shape == (20, 8)
    assert part.target_ids.shape == (20, 7)  # and the token that a decoder begins with
    assert not part.target_ids[:, 0].any()
    task = task_of(config_of(folder).model)
    some = part.rows([3, 5])
    batch = task.batch(some, torch.device("cpu"))
    source_mask, target_mask = some.masks()
    assert source_mask.sum(1).tolist() == some.lengths.tolist()
    assert target_mask.sum(1).tolist() == (some.target_lengths - 1).tolist()
    for row, length in enumerate(some.target_lengths):
        right = some.target_ids[row, 1:length].tolist()
        assert batch.targets[row].tolist() == right + [-100] * (batch.targets.shape[1] - len(right))
        assert batch.inputs["decoder_input_ids"][row, : length - 1].tolist() == [0, *right[:-1]]
    assert task.predictions(some).tolist() == (some.target_lengths - 1).tolist()
    assert task.size(some) == int(some.lengths.sum() + some.target_lengths.sum() - 2)


def divided(folder: Path, part: Path, results: Path) -> None:
    """On each of two ranks: score and generate with the weights divided among them."""
    worker = Worker(torch.distributed.get_rank(), 2, 0, 2, "cpu", results, "evaluate")
    config = config_of(folder)
    engine = inference_engine(inference_settings({}, 3, "float32"), folder / "model", config.model, worker.log)
    score = score_part(worker, engine, task_of(config.model), load_part(part), 3)
    said = generate(worker, engine, load_part(part), config, worker.tell)
    (results / f"{worker.rank}.json").write_text(json.dumps([score.loss, said.tolist()]))


def test_with_divided_weights_it_says_the_same(folder: Path, tmp_path: Path) -> None:
    """Texts of different lengths, more batches on one rank than on the other, and transformers alone beside them."""
    part = pairs(folder / "model", 15)
    save_part(tmp_path / "part.safetensors", part)
    on_ranks(2, divided, folder, tmp_path / "part.safetensors", tmp_path)
    loss, said = json.loads((tmp_path / "0.json").read_text())
    assert [loss, said] == json.loads((tmp_path / "1.json").read_text())
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder / "model").eval()
    total, count = 0.0, 0
    for row in range(len(part)):
        ids = torch.from_numpy(part.ids[row : row + 1, : part.lengths[row]]).long()
        target = torch.from_numpy(part.target_ids[row : row + 1, 1 : part.target_lengths[row]]).long()
        with torch.no_grad():
            found = model(input_ids=ids, labels=target).loss  # shifts to the right by itself
            alone = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)[0, 1:].tolist()
        total, count = total + float(found) * target.shape[1], count + target.shape[1]
        assert said[row] == alone + [0] * (6 - len(alone))
    assert loss == pytest.approx(total / count, rel=1e-5)


def test_texts_are_compared_from_0_to_1() -> None:
    right = ["the cat sat on the mat today", "a dog ran far away from here"]
    assert [COMPARE[name](right, right) for name in GENERATED] == pytest.approx([1.0, 1.0, 1.0])
    worse = {name: COMPARE[name](["the cat sat on a mat", "no"], right) for name in GENERATED}
    assert 0 < worse["bleu"] < worse["chrf"] < 1
    assert worse["rouge_l"] == pytest.approx((2 * 5 / (6 + 7)) / 2)
    russian = ["кошка сидит на ковре сегодня", "собака убежала далеко отсюда вчера"]
    assert rouge_l(russian, russian) == pytest.approx(1.0)


def test_what_an_encoder_decoder_cannot_do_is_refused(folder: Path, tmp_path: Path, command: Any) -> None:
    for change, message in [
        ("retrain.distillation.hidden_weight=0.2", "compares states at the places of one series"),
        ("retrain.distillation={weight: 0.5, top_k: 4, cache: true}", "holds blocks of text"),
        ("model.task=causal-lm", "data.target_size is of model.task sequence-to-sequence"),
        ("collect.samples=41", "calibration batch 0 has 40 token samples to draw from of what is read, 41 are needed"),
        ("data.test.target_field=other", "has no field 'other': set target_field to one of text, said"),
    ]:
        config = write_config(tmp_path / "config.yaml", settings(folder))
        code, output = command("run", config, "--dry-run", "--set", change)
        assert code == 2, output
        assert message in " ".join(output.split()), output


def test_a_model_says_how_its_decoder_begins(tmp_path: Path) -> None:
    T5.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    del content["decoder_start_token_id"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="has the pad_token_id 0 and the decoder_start_token_id None"):
        decoder_tokens(tmp_path, trust_remote_code=False)


def test_a_translator_between_many_languages_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"many languages \(NllbTokenizer\), and is told which by a token"):
        require_one_language(transformers.NllbTokenizer(), tmp_path)
    make_tokenizer(tmp_path)
    require_one_language(load_tokenizer(tmp_path, trust_remote_code=False), tmp_path)


def test_a_dry_run_counts_pairs(folder: Path, tmp_path: Path, command: Any) -> None:
    code, output = command("run", write_config(tmp_path / "config.yaml", settings(folder)), "--dry-run")
    assert code == 0, output
    assert "9, encoder.block.0 to decoder.block.3" in output
    assert "pairs of texts" in output
