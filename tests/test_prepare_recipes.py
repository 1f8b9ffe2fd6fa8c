"""The script that makes the recipes' data: what it takes from the packages."""

import gzip
import io
import json
import struct
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import prepare_recipes
import pytest
import soundfile
import torch
import transformers
from fetching import PrepareError
from recipes import images, phonemes, speech, texts, training
from speech_models import WHISPER, WHISPER_TOKENS, make_whisper_tokenizer


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def scores(folder: Path, lines: list[str]) -> Path:
    """Scores in an archive in an archive, as in the package."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        add(archive, texts.SCORES, "\n".join(lines).encode("latin-1"))
    with tarfile.open(folder / "source.tar.gz", "w:gz") as archive:
        add(archive, "vaderSentiment-3.3.2/README.rst", b"")
        add(archive, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())
    return folder / "source.tar.gz"


def mails(folder: Path, mails: list[tuple[str, str]]) -> Path:
    """E-mails as in the package, each twice: as JSON, and as it came."""
    with tarfile.open(folder / "mails.tgz", "w:gz") as archive:
        add(archive, "package/package.json", b"{}")
        for number, (group, text) in enumerate(mails):
            name = f"package/data/{group}/{number:05}.0f0f"
            add(archive, f"{name}.json", json.dumps({"id": str(number), "group": group, "text": text}).encode())
            add(archive, f"{name}.txt", text.encode("utf-8"))
    return folder / "mails.tgz"


def dictionary(folder: Path, lines: list[str]) -> Path:
    with zipfile.ZipFile(folder / "words.whl", "w") as archive:
        archive.writestr(phonemes.DICTIONARY, "".join(f"{line}\n" for line in lines))
    return folder / "words.whl"


def ct2_file(variables: dict[str, np.ndarray]) -> bytes:
    """As CTranslate2 writes a model, with what follows the tensors."""

    def text(name: str) -> bytes:
        return struct.pack("<H", len(name) + 1) + name.encode() + b"\0"

    content = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, len(variables))
    for name, value in variables.items():
        shape = struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape)
        code = speech.DTYPES.index(value.dtype.name)
        content += text(name) + shape + struct.pack("<BI", code, value.nbytes) + value.tobytes()
    return content + struct.pack("<I", 1) + text("decoder/projection/weight") + text("decoder/embeddings/weight")


def stacked(model: Any) -> dict[str, np.ndarray]:
    """The tensors of a Whisper as CTranslate2 names and stacks them."""
    state = {name.removeprefix("model."): tensor.numpy() for name, tensor in model.state_dict().items()}
    variables = {
        f"{stack}/position_encodings/encodings": state[f"{stack}.embed_positions.weight"]
        for stack in ("encoder", "decoder")
    } | {"decoder/embeddings/weight": state["decoder.embed_tokens.weight"]}

    def put(target: str, *names: str) -> None:
        weights = [state[f"{name}.weight"] for name in names]
        biases = [state.get(f"{name}.bias", np.zeros(len(weights[0]), np.float32)) for name in names]
        variables[f"{target}/weight"], variables[f"{target}/bias"] = np.concatenate(weights), np.concatenate(biases)

    def norm(target: str, name: str) -> None:
        variables[f"{target}/gamma"], variables[f"{target}/beta"] = state[f"{name}.weight"], state[f"{name}.bias"]

    for stack, depth in (("encoder", model.config.encoder_layers), ("decoder", model.config.decoder_layers)):
        norm(f"{stack}/layer_norm", f"{stack}.layer_norm")
        for layer in range(depth):
            theirs, ours = f"{stack}/layer_{layer}", f"{stack}.layers.{layer}"
            put(f"{theirs}/self_attention/linear_0", *(f"{ours}.self_attn.{part}_proj" for part in "qkv"))
            put(f"{theirs}/self_attention/linear_1", f"{ours}.self_attn.out_proj")
            norm(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm")
            if stack == "decoder":
                put(f"{theirs}/attention/linear_0", f"{ours}.encoder_attn.q_proj")
                put(f"{theirs}/attention/linear_1", *(f"{ours}.encoder_attn.{part}_proj" for part in "kv"))
                put(f"{theirs}/attention/linear_2", f"{ours}.encoder_attn.out_proj")
                norm(f"{theirs}/attention/layer_norm", f"{ours}.encoder_attn_layer_norm")
            put(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            put(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
            norm(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
    for convolution in ("conv1", "conv2"):
        put(f"encoder/{convolution}", f"encoder.{convolution}")
    return variables


def pairs(file: Path, first: str, second: str) -> list[tuple[str, str]]:
    return sorted((record[first], record[second]) for record in training.read_records(file, 1.0))


def test_sentences_that_people_agree_on_are_taken_once(tmp_path: Path) -> None:
    lines = ["1\t2.5\tA fine caf\xe9", "2\t-3.1\tDreadful", "3\t0.4\tSo so", "4\t2.4\tA fine caf\xe9", "5\t-0.5\tDull"]
    target = tmp_path / "movies.jsonl"
    texts.write_movies(target, scores(tmp_path, lines))
    assert pairs(target, "text", "label") == [
        ("A fine caf\xe9", "positive"), ("Dreadful", "negative"), ("Dull", "negative"),
    ]  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {"movies.jsonl", "source.tar.gz"}


def test_mails_that_begin_alike_are_taken_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive = mails(tmp_path, [
        ("easy-ham-1", "From: a\nSubject: lunch\n\nAt one?\n\nYours\n"),
        ("hard-ham-1", "From: b\n\nYour caf\xe9\u2019s news"),
        ("spam-1", "From: c\n\nBUY NOW\n"),
        ("spam-2", "From: d\nX-Other: e\n\n  BUY\tNOW"),
        ("spam-2", "From: only a head"),
        ("spam-2", "From: f\n\n" + 30 * "Win now " + "at 1@example.org"),
        ("spam-2", "From: f\n\n" + 30 * "Win now " + "at 2@example.org"),
    ])  # fmt: skip
    target = tmp_path / "spam.jsonl"
    texts.write_spam(target, archive)
    assert pairs(target, "text", "label") == [
        ("At one?\n\nYours", "ham"), ("BUY NOW", "spam"), (30 * "Win now " + "at 1@example.org", "spam"),
        ("Your caf\xe9\u2019s news", "ham"),
    ]  # fmt: skip
    assert "4 e-mails, 2 of them spam" in capsys.readouterr().out


def test_words_of_letters_are_taken_with_their_first_pronunciation(tmp_path: Path) -> None:
    lines = ["'em AH0 M", "aalborg AO1 L B AO0 R G # place, danish", "hello HH AH0 L OW1", "hello(2) HH EH0 L OW1",
             "a.m. EY2 EH1 M", "x-ray EH1 K S R EY2", "d'arcy D AA1 R S IY0", ";;; a remark"]  # fmt: skip
    target = tmp_path / "phonemes.jsonl"
    phonemes.write_phonemes(target, dictionary(tmp_path, lines))
    assert pairs(target, "text", "target") == [
        ("a a l b o r g", "AO1 L B AO0 R G"), ("h e l l o", "HH AH0 L OW1"),
    ]  # fmt: skip


def test_letters_and_phonemes_have_tokens_and_an_end(tmp_path: Path) -> None:
    phonemes.make_tokenizer([{"text": "h e l l o", "target": "HH AH0 L OW1"}]).save_pretrained(tmp_path)
    transformers.T5Config().save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, len(tokenizer)) == (0, 1, 2, 11)
    row = tokenizer("h o L", text_target="L OW1 z")
    assert list(row) == ["input_ids", "attention_mask", "labels"]
    assert tokenizer.convert_ids_to_tokens(row["input_ids"]) == ["h", "o", "L", "</s>"]
    assert tokenizer.convert_ids_to_tokens(row["labels"]) == ["L", "OW1", "<unk>", "</s>"]
    assert tokenizer.decode(tokenizer("HH AH0 L OW1")["input_ids"], skip_special_tokens=True) == "HH AH0 L OW1"


def test_a_whisper_of_ctranslate2_has_the_tensors_of_transformers() -> None:
    """Of the encoder's places the first 30 are kept."""
    torch.manual_seed(0)
    model = transformers.WhisperForConditionalGeneration(WHISPER)
    found = speech.named(speech.read_variables(ct2_file(stacked(model))), 30)
    expected = {name: value for name, value in model.state_dict().items() if name != "proj_out.weight"}
    places = "model.encoder.embed_positions.weight"
    expected[places] = expected[places][:30]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_model_begins_and_ends_as_its_tokenizer_does(tmp_path: Path) -> None:
    """With empty weights: what the two packages carry is not here."""
    tokenizer = make_whisper_tokenizer(tmp_path)
    tokenizer.set_prefix_tokens(language="english", task="transcribe")
    config = speech.config_for(tokenizer, 200)
    end, start = tokenizer.convert_tokens_to_ids(WHISPER_TOKENS[:2])
    assert (config.decoder_start_token_id, config.eos_token_id, config.pad_token_id) == (start, end, end)
    assert config.max_source_positions == 200


def test_a_file_of_another_version_is_refused() -> None:
    with pytest.raises(PrepareError, match="another version of CTranslate2's format"):
        speech.read_variables(struct.pack("<I", 7))


def test_prompts_that_are_short_and_spoken_are_taken(tmp_path: Path) -> None:
    (tmp_path / "sounds/digits").mkdir(parents=True)
    for name, seconds in (("digits/1", 0.5), ("hello", 1.0), ("long", 4.5), ("beep", 0.2), ("unlisted", 1.0)):
        soundfile.write(tmp_path / f"sounds/{name}.wav", np.zeros(round(8000 * seconds)), 8000)
    lines = [
        "; a remark",
        "",
        "beep: [a beep]",
        "digits/1: one",
        "hello: Hello.  How: are you?",
        "long: Long",
        "no: No",
    ]
    (tmp_path / "list.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    speech.write_prompts(tmp_path, tmp_path / "sounds", tmp_path / "list.gz")
    assert pairs(tmp_path / "prompts.jsonl", "audio", "target") == [
        ("prompts/digits-1.wav", "one"), ("prompts/hello.wav", "Hello.  How: are you?"),
    ]  # fmt: skip
    assert {path.name for path in (tmp_path / "prompts").iterdir()} == {"digits-1.wav", "hello.wav"}


def test_the_order_of_records_is_always_the_same(tmp_path: Path) -> None:
    records = [{"text": str(number)} for number in range(100)]
    for name in ("one", "two"):
        training.write_records(tmp_path / name, records.copy())
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    written = training.read_records(tmp_path / "one", 1.0)
    assert written != records
    assert training.read_records(tmp_path / "one", 0.3) == written[:30]


def test_a_folder_that_was_not_finished_is_not_there(tmp_path: Path) -> None:
    def killed(target: Path) -> None:
        with training.new_folder(target) as partial:
            (partial / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    with training.new_folder(tmp_path / "model") as partial:
        (partial / "whole").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "whole"]


@pytest.mark.parametrize(
    ("names", "code", "message"),
    [
        (["songs"], 2, "no recipe songs: choose from movies, "),
        (["prompts"], 1, "prepare_recipes: prompts needs soxr: pip install -e '.[speech]'\n"),
        ([], 1, "prepare_recipes: prompts needs soxr"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    names: list[str], code: int, message: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(speech, "find_spec", lambda name: None if name == "soxr" else object())
    monkeypatch.setattr("sys.argv", ["prepare_recipes.py", str(tmp_path / "made"), *names])
    with pytest.raises(SystemExit) as error:
        sys.exit(prepare_recipes.main())
    assert error.value.code == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_what_is_there_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("movies.jsonl", "spam.jsonl", "phonemes.jsonl", "prompts.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "fashion-mnist").mkdir()
    models = ("minilm-movies", "minilm-spam", "smollm2-movies", "resnet-fashion", "vit-fashion", "t5-phonemes")
    for name in (*models, "whisper-prompts"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    for prepare in prepare_recipes.RECIPES.values():
        prepare(tmp_path)
    assert capsys.readouterr().out.count("there already") == 7
    assert not (tmp_path / "download").exists()


@pytest.mark.parametrize("make", [images.resnet, images.vit])
def test_networks_take_the_images(make) -> None:
    model = make()
    assert model(torch.zeros(2, 1, 28, 28)).logits.shape == (2, len(images.CLOTHES))
    assert model.config.id2label[9] == "ankle boot"
