"""Recordings: how they are read, and the whole road on a small Whisper, with real Ray and real DeepSpeed."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile
import torch
import transformers
from conftest import WORDS, make_tokenizer, on_ranks, settings_for, write_config
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from mpruner_dist.cluster.settings import inference_settings
from mpruner_dist.cluster.worker import Worker
from mpruner_dist.config import Config
from mpruner_dist.data.parts import load_part, save_part
from mpruner_dist.data.prepare import Watcher
from mpruner_dist.data.readers import make_reader
from mpruner_dist.data.speech import Speech, Speller
from mpruner_dist.errors import UserError
from mpruner_dist.evaluation.extras import require_extras
from mpruner_dist.evaluation.generation import generate, word_error_rate
from mpruner_dist.models.engines import inference_engine
from mpruner_dist.models.scoring import score_part
from mpruner_dist.models.stacks import run_blocks
from mpruner_dist.tasks import task_of

Run = Callable[..., tuple[int, str]]
ENCODER, DECODER = 4, 3
IDLE = [1, 5]  # the second block of the encoder, and the second of the decoder
SAID = 6  # words in a recording
PROMPT = ["<s>", "<en>"]
SPECIAL = ["<pad>", *PROMPT, "</s>", "<unk>"]
RECORDINGS = 60
WHISPER_TOKENS = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
WHISPER = transformers.WhisperConfig(
    vocab_size=len(SPECIAL) + len(WORDS), d_model=32, encoder_layers=ENCODER, decoder_layers=DECODER,
    encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=8,
    max_source_positions=50, max_target_positions=48, pad_token_id=0, bos_token_id=1, eos_token_id=3,
    decoder_start_token_id=1, suppress_tokens=[], begin_suppress_tokens=None,
)  # fmt: skip


def make_words(folder: Path) -> None:
    """A tokenizer that puts the beginning and a language in front of every text, as Whisper's does."""
    numbers = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> <en> $A </s>", special_tokens=[(token, numbers[token]) for token in (*PROMPT, "</s>")]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens=["<en>"],
    ).save_pretrained(folder)  # fmt: skip


def make_whisper_tokenizer(folder: Path) -> Any:
    """Whisper's own class, of letters alone, set to no language, as OpenAI's are."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = transformers.WhisperTokenizer({letter: n for n, letter in enumerate(letters)}, [])
    tokenizer.add_special_tokens({"additional_special_tokens": WHISPER_TOKENS})
    tokenizer.save_pretrained(folder)
    return transformers.WhisperTokenizer.from_pretrained(folder)  # what it begins with is made of its special tokens


def make_whisper(folder: Path) -> Any:
    torch.manual_seed(0)
    model = transformers.WhisperForConditionalGeneration(WHISPER).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
        for layer in IDLE:
            for name, parameter in run_blocks(model)[layer].named_parameters():
                if name.endswith(("out_proj.weight", "fc2.weight", "out_proj.bias", "fc2.bias")):
                    parameter.mul_(1e-3)
    model.save_pretrained(folder)
    make_words(folder)
    transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(folder)
    return model


def sound(seed: int, seconds: float, rate: int) -> Any:
    draw = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    tones = sum(np.sin(2 * np.pi * draw.uniform(100, 3000) * time + draw.uniform(0, 6)) for _ in range(4))
    return (0.1 * tones).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Whisper, and recordings with what it says of each: WAV files beside a list of them."""
    folder = tmp_path_factory.mktemp("speech")
    model = make_whisper(folder / "model")
    (folder / "sounds").mkdir()
    draw, records, heard = random.Random(0), [], []
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder / "model")
    for number in range(RECORDINGS):
        samples = sound(number, draw.uniform(0.3, 0.95), 16000)
        soundfile.write(folder / f"sounds/{number}.wav", samples, 16000, subtype="FLOAT")
        heard.append(extractor(samples, sampling_rate=16000, return_tensors="pt")["input_features"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    said = transformers.GenerationMixin.generate(
        model, input_features=torch.cat(heard), decoder_input_ids=torch.tensor([[1, 2]] * RECORDINGS),
        max_new_tokens=SAID, min_new_tokens=SAID, do_sample=False, suppress_tokens=list(range(len(SPECIAL))),
    )[:, 2:]  # fmt: skip
    for number, text in enumerate(tokenizer.batch_decode(said)):
        records.append({"audio": f"sounds/{number}.wav", "target": text})
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


def settings(folder: Path) -> dict[str, Any]:
    settings = settings_for(folder)
    settings["model"]["task"] = "automatic-speech-recognition"
    for part in ("calibration", "train", "validation", "test"):
        settings["data"][part]["path"] = str(folder / "list.jsonl")
    settings["collect"] |= {"batch_size": 3, "num_batches": 4, "samples": 24, "skip_tokens": 0, "outlier_norm": None}
    settings["retrain"] |= {"steps": 8, "learning_rate": 1e-3, "save_every": 8, "eval_every": 8}
    settings["plan"] = {"method": "greedy", "keep_layers": 5, "protect_first": 0, "protect_last": 0}
    settings["evaluate"] = {"batch_size": 5}
    return settings


def config_of(folder: Path, **changes: Any) -> Config:
    return Config.model_validate(settings(folder) | changes)


def read(folder: Path, path: Path, limit: int | None = None, **fields: Any) -> Speech:
    config = config_of(folder)
    source = config.data.test.model_copy(update={"path": str(path), "take": (0.0, 1.0), **fields})
    return make_reader(config, folder / "model").read(source, limit, Watcher("test", folder / "progress.json"))


@pytest.mark.ray
def test_a_whisper_is_pruned_in_rounds_that_its_word_error_rate_judges(
    folder: Path, tmp_path: Path, mpruner: Run
) -> None:
    asked = settings(folder) | {
        "rounds": {"metric": "word_error_rate", "tolerance": 0.3, "remove": 2, "max_stride": 1, "max_rounds": 2}
    }
    run = tmp_path / "run"
    code, output = mpruner("run", write_config(tmp_path / "config.yaml", asked), "--run-dir", run)
    assert code == 0, output
    rounds = json.loads((run / "rounds.json").read_text())
    before = rounds["original"]["word_error_rate"]
    assert before <= 1 / SAID + 1e-6  # it is free to say a word more than it was asked for
    assert rounds["worst"] == pytest.approx(before + 0.3)
    [first] = rounds["rounds"]
    assert first["removed"] == IDLE
    assert first["accepted"]
    assert "where a rise of at most 0.3 is tolerated" in first["why"]
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


def test_a_recording_is_the_same_in_every_form(folder: Path, tmp_path: Path) -> None:
    """A list of paths; a folder with such a list; a saved data set that holds the files' bytes."""
    expected = read(folder, folder / "list.jsonl", 5)
    texts = [json.loads(line)["target"] for line in (folder / "list.jsonl").read_text().splitlines()[:5]]
    recordings = tmp_path / "recordings"
    recordings.mkdir()
    for number in range(5):
        shutil.copy(folder / f"sounds/{number}.wav", recordings)
    lines = [json.dumps({"file_name": f"{number}.wav", "said": text}) for number, text in enumerate(texts)]
    (recordings / "metadata.jsonl").write_text("\n".join(lines))
    content = [(recordings / f"{number}.wav").read_bytes() for number in range(5)]
    sounds = [{"bytes": some, "path": None} for some in content]
    table = datasets.Dataset.from_dict({"sound": sounds, "said": texts, "noise": sounds})
    for column in ("sound", "noise"):
        table = table.cast_column(column, datasets.Audio())
    table.save_to_disk(str(tmp_path / "saved"))
    for path, field in ((recordings, "file_name"), (tmp_path / "saved", "sound")):
        found = read(folder, path, 5, audio_field=field, target_field="said")
        for name, value in expected.tensors().items():
            np.testing.assert_array_equal(found.tensors()[name], value)


def test_other_rates_and_channels_are_made_the_models(folder: Path, tmp_path: Path) -> None:
    """The same tones in two channels at three times the rate; the first 0.5 s of 1 s hold sound."""
    stereo = np.stack([1.5 * sound(1, 0.5, 48000), 0.5 * sound(1, 0.5, 48000)], 1)
    soundfile.write(tmp_path / "high.flac", stereo, 48000)
    soundfile.write(tmp_path / "plain.wav", sound(1, 0.5, 16000), 16000, subtype="FLOAT")
    lines = [json.dumps({"audio": name, "target": WORDS[0]}) for name in ("high.flac", "plain.wav")]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    part = read(folder, tmp_path / "list.jsonl")
    assert part.lengths.tolist() == [25, 25]
    assert [mask.sum(1).tolist() for mask in part.masks()] == [[25, 25], [3, 3]]
    assert [mask.shape[1] for mask in part.masks()] == [50, 3]
    within = part.features[:, :, 2:48]  # the edges ring
    assert np.abs(within[0] - within[1]).mean() < 0.02
    assert np.abs(part.features[0] - part.features[0].mean()).mean() > 0.1


def test_what_is_longer_than_the_model_hears_is_left_out_and_told(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, seconds in (("short.wav", 0.9), ("long.wav", 1.1)):
        soundfile.write(tmp_path / name, sound(3, seconds, 16000), 16000)
    lines = [json.dumps({"audio": name, "target": WORDS[1]}) for name in ("long.wav", "short.wav")]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    assert len(read(folder, tmp_path / "list.jsonl")) == 1
    assert "that are longer than the 1 s that the model hears at once, and left out: 1" in caplog.text


def test_words_are_counted_without_regard_to_how_they_are_written() -> None:
    assert word_error_rate(["Press one, now!"], ["press one now"]) == 0
    # one wrong and one missing of five, and one too many where nothing was said
    assert word_error_rate(["press two", "x"], ["press one now.", "", "a b"][:2]) == pytest.approx(3 / 3)
    assert word_error_rate(["a c", ""], ["a b", "d e"]) == pytest.approx(3 / 4)
    assert word_error_rate(["का के"], ["की को"]) == 1
    assert word_error_rate(["cafe\u0301"], ["CAF\xc9"]) == 0


def test_a_model_of_many_languages_is_told_which(tmp_path: Path) -> None:
    tokenizer = make_whisper_tokenizer(tmp_path)
    end, start, *asked = tokenizer.convert_tokens_to_ids(WHISPER_TOKENS)
    sizes = {"decoder_start_token_id": start, "eos_token_id": end, "max_target_positions": 448}
    english = transformers.WhisperConfig(vocab_size=51864, **sizes)
    assert Speller(tokenizer, None, None, english).prompt == [start, asked[-1]]
    multilingual = transformers.WhisperConfig(vocab_size=51865, **sizes)
    with pytest.raises(UserError, match=r"set data\.language to what is spoken"):
        Speller(tokenizer, None, None, multilingual)
    with pytest.raises(UserError, match=r"data\.language klingon: the model's tokenizer does not know it"):
        Speller(tokenizer, "klingon", None, multilingual)
    speller = Speller(tokenizer, "english", 7, multilingual)
    assert speller.prompt == [start, *asked]
    letters = tokenizer.convert_tokens_to_ids(["a", "b"])
    assert speller.spell("ab") == [start, *asked, *letters, end]
    assert speller.cut == 0
    assert speller.spell("abba") == [start, *asked, *letters, end]
    assert speller.cut == 1


def test_what_cannot_be_heard_is_refused(
    folder: Path, tmp_path: Path, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "no.wav").write_text("no sound")
    soundfile.write(broken / "empty.wav", np.zeros(0, np.float32), 16000)
    soundfile.write(broken / "infinite.wav", np.full(9, np.nan, np.float32), 16000, subtype="FLOAT")
    for name in ("no.wav", "empty.wav", "none.wav", "infinite.wav"):
        (broken / f"{name}.jsonl").write_text(json.dumps({"audio": name, "target": "a"}))
    (broken / "number.jsonl").write_text(json.dumps({"audio": 3, "target": "a"}))
    deaf, other, endless, teacher = (tmp_path / name for name in ("deaf", "other", "endless", "teacher"))
    for copy in (deaf, other, endless, teacher):
        shutil.copytree(folder / "model", copy)
    make_tokenizer(endless)
    ear = json.loads((teacher / "config.json").read_text()) | {"num_mel_bins": 16}
    (teacher / "config.json").write_text(json.dumps(ear))
    (deaf / "preprocessor_config.json").unlink()
    transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1).save_pretrained(other)
    for change, message in [
        ("data.test={path: {}/no.wav.jsonl}", "audio of record 0 of {}/no.wav.jsonl is no recording that can be read"),
        ("data.test={path: {}/empty.wav.jsonl}", "audio of record 0 of {}/empty.wav.jsonl is empty"),
        ("data.test={path: {}/none.wav.jsonl}", "is no recording that can be read"),
        ("data.test={path: {}/number.jsonl}", "set audio_field, or write the paths of files there"),
        ("data.test.audio_field=sound", "has no field 'sound': set audio_field to one of audio, target"),
        ("data.target_size=49", "3 tokens begin and end each text, and the decoder has positions for 48"),
        ("data.target_size=3", "data.target_size 3: 3 tokens begin and end each text"),
        ("data.language=english", "data.language english: the model's tokenizer does not know it"),
        ("data.test={path: {}/infinite.wav.jsonl}", "is not finite: take it out"),
        (f"model.path={endless}", "begins a text with the tokens [] and ends it with None"),
        (f"retrain.distillation.teacher={teacher}", "has num_mel_bins 16, the model 8: both must hear the same"),
        (f"model.path={deaf}", "needs a preprocessor_config.json with a WhisperFeatureExtractor"),
        (f"model.path={other}", "makes 16 bands x 100 frames of a recording, and the model in config.json takes 8"),
        ("retrain.distillation.hidden_weight=0.2", "an encoder and a decoder have two"),
        ("rounds={metric: rouge_l, tolerance: 0.1, remove: 1}", "rounds.metric rouge_l is none of model.task"),
    ]:
        config = write_config(tmp_path / "config.yaml", settings(folder))
        code, output = command("run", config, "--dry-run", "--set", change.replace("{}", str(broken)))
        assert code == 2, output
        assert message.format(broken).replace(" ", "") in "".join(output.split()), output
    monkeypatch.setattr("mpruner_dist.evaluation.extras.find_spec", lambda name: None if name == "soxr" else name)
    text = {"model": {"path": "model", "task": "sequence-to-sequence"}, "data": settings(folder)["data"]}
    with pytest.raises(ValueError, match=r"data\.language is of model\.task automatic-speech-recognition, not"):
        Config.model_validate(text | {"data": text["data"] | {"language": "english"}})
    with pytest.raises(UserError, match=r"pip install 'mpruner-dist\[speech\]'"):
        require_extras(config_of(folder))
