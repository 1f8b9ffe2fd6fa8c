"""Recordings and what is said in them: how they are read, compared and refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile
import transformers
from conftest import WORDS, make_tokenizer, write_config
from speech_models import (
    WHISPER_TOKENS,
    config_of,
    make_recordings,
    make_whisper_tokenizer,
    read,
    settings,
    sound,
)

from mpruner_dist.config import Config, SourceConfig
from mpruner_dist.data.speech import Speller
from mpruner_dist.errors import UserError
from mpruner_dist.evaluation.extras import require_extras
from mpruner_dist.evaluation.generation import word_error_rate
from mpruner_dist.steps.data import recording_digests


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speech")
    make_recordings(folder)
    return folder


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
    # one wrong and one missing of three, and one too many where nothing was said
    assert word_error_rate(["press two", "x"], ["press one now.", ""]) == pytest.approx(3 / 3)
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
    with pytest.raises(UserError, match=r"data\.language english: the model knows one language only"):
        Speller(tokenizer, "english", None, english)
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
    with pytest.raises(UserError, match=r"pip install '\.\[speech\]'"):
        require_extras(config_of(folder))


def test_recordings_that_change_are_other_data(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "speech")
    source = SourceConfig(path=str(tmp_path / "speech/list.jsonl"))
    before = recording_digests(source)
    assert len(before) == len((tmp_path / "speech/list.jsonl").read_text().splitlines())
    assert recording_digests(source) == before
    shutil.copy(tmp_path / "speech/sounds/1.wav", tmp_path / "speech/sounds/0.wav")
    after = recording_digests(source)
    assert [path for path in before if before[path] != after[path]] == [str(tmp_path / "speech/sounds/0.wav")]
    assert recording_digests(SourceConfig(path=str(tmp_path / "speech/sounds"))) == {}  # digested as a folder
