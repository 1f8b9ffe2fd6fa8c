"""Rewriting of real small models of several families, and what it refuses."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import can_unshare, make_model
from safetensors.torch import load_file, save_file

from mpruner_dist.checkpoints.folder import read_checkpoint
from mpruner_dist.checkpoints.stored import stored_safetensors
from mpruner_dist.errors import StageFailure, UserError
from mpruner_dist.models.blocks import skipped
from mpruner_dist.models.stacks import run_blocks
from mpruner_dist.rewriting.finished import forget_request
from mpruner_dist.rewriting.proof import compare_logits, verify_checkpoint
from mpruner_dist.rewriting.rewrite import rewrite_checkpoint

IDS = torch.randint(3, 128, (2, 20), generator=torch.Generator().manual_seed(5))
WINDOWED = ["sliding_attention", "full_attention"] * 4


def test_skipping_is_the_same_as_deleting(tmp_path: Path) -> None:
    """The reference of all these tests, held against a plain deletion in memory."""
    model = make_model("llama", tmp_path / "model")
    blocks = run_blocks(model)
    with torch.no_grad(), skipped(blocks, [2, 5]):
        expected = model(input_ids=IDS, use_cache=False).logits
    del model.model.layers[5], model.model.layers[2]
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS, use_cache=False).logits, expected)


def test_a_sharded_checkpoint_keeps_its_bytes_and_companions(tiny: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny / "model", source)
    (source / "modeling_own.py").write_text("# remote code\n")
    (source / "old.bin").write_bytes(b"weights")
    for folder, file in (("additional_chat_templates", "rag.jinja"), ("onnx", "model.onnx"), (".cache", "a.json")):
        (source / folder).mkdir()
        (source / folder / file).write_text("{}")
    rewrite_checkpoint(source, tmp_path / "small", [0, 3, 7])
    old, new = read_checkpoint(source), read_checkpoint(tmp_path / "small")
    assert (tmp_path / "small/additional_chat_templates/rag.jinja").read_text() == "{}"
    assert [path.name for path in (tmp_path / "small").iterdir() if path.is_dir()] == ["additional_chat_templates"]
    assert len(old.shards) > 3
    assert len(new.shards) > 1
    tensors = {name: tensor for shard in new.shards for name, tensor in load_file(tmp_path / "small" / shard).items()}
    before = {name: tensor for shard in old.shards for name, tensor in load_file(source / shard).items()}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str([0, 3, 7][int(parts[2])])
        assert torch.equal(tensor, before[".".join(parts)])
    index = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    layer_map = json.loads((tmp_path / "small" / "layer_map.json").read_text())
    assert layer_map.pop("request")
    assert layer_map == {"old_to_new": {"0": 0, "3": 1, "7": 2}, "new_to_old": [0, 3, 7]}
    for companion in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "modeling_own.py"):
        assert (tmp_path / "small" / companion).read_bytes() == (source / companion).read_bytes()
    assert not (tmp_path / "small" / "old.bin").exists()
    assert json.loads((tmp_path / "small" / "config.json").read_text())["num_hidden_layers"] == 3


def test_keeping_everything_changes_no_byte_of_the_tensors(tiny: Path, tmp_path: Path) -> None:
    rewrite_checkpoint(tiny / "model", tmp_path / "same", list(range(8)))
    for shard in read_checkpoint(tiny / "model").shards:
        before, after = load_file(tiny / "model" / shard), load_file(tmp_path / "same" / shard)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_old_config_without_layer_types_keeps_its_pattern(tmp_path: Path) -> None:
    """The class computes the list from the depth: from the new depth it would come out wrong."""
    make_model("gemma2", tmp_path / "model", head_dim=8, sliding_window=4, layer_types=WINDOWED)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    del config["layer_types"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    rewrite_checkpoint(tmp_path / "model", tmp_path / "small", [0, 2, 3, 7])
    kept = transformers.AutoConfig.from_pretrained(tmp_path / "model").layer_types
    assert transformers.AutoConfig.from_pretrained(tmp_path / "small").layer_types == [kept[i] for i in (0, 2, 3, 7)]


def test_a_family_that_needs_more_than_renaming_is_refused(tmp_path: Path) -> None:
    """GPT-2 that divides attention by the index of its layer: renumbered, it computes something else."""
    make_model("gpt2", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["scale_attn_by_inverse_layer_idx"] = True
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"attn\.scaling would be .*The nearest that can be kept: 0-4"):
        rewrite_checkpoint(tmp_path / "model", tmp_path / "small", [0, 4, 5, 6, 7])
    assert not (tmp_path / "small").exists()


def test_an_interrupted_rewrite_goes_on_and_trusts_no_half_shard(tiny: Path, tmp_path: Path) -> None:
    """Stopped after two shards, a third half-written."""

    def stop_early(function: Any, items: list[Any]) -> list[Any]:
        for item in items[:2]:
            function(item)
        items[2].target.with_suffix(".tmp").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rewrite_checkpoint(tiny / "model", tmp_path / "small", [0, 1, 7], run_tasks=stop_early)
    assert not (tmp_path / "small").exists()
    partial = next(tmp_path.glob(".small.partial-*"))
    first = sorted(partial.glob("*.safetensors"))[0]
    before = first.stat().st_mtime_ns
    rewrite_checkpoint(tiny / "model", tmp_path / "small", [0, 1, 7])
    assert (tmp_path / "small" / first.name).stat().st_mtime_ns == before
    assert not list(tmp_path.glob(".small.partial-*"))
    verify_checkpoint(tmp_path / "small")


def test_an_earlier_rewrite_is_replaced(tiny: Path, tmp_path: Path) -> None:
    rewrite_checkpoint(tiny / "model", tmp_path / "small", [0, 1, 7])
    rewrite_checkpoint(tiny / "model", tmp_path / "small", [0, 7])
    assert json.loads((tmp_path / "small" / "layer_map.json").read_text())["new_to_old"] == [0, 7]


@pytest.mark.parametrize(
    ("kept", "message"),
    [([], "keeps? is empty|kept is empty"), ([0, 9], "layer 9"), ([3, 1], "ascending"), ([1, 1], "once")],
)
def test_impossible_plans_are_refused(tiny: Path, tmp_path: Path, kept: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rewrite_checkpoint(tiny / "model", tmp_path / "small", kept)
    assert not (tmp_path / "small").exists()


def test_targets_that_would_do_harm_are_refused(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="no rewritten checkpoint"):
        rewrite_checkpoint(tiny / "model", tmp_path / "mine", [0, 7])
    for inside in (tiny / "model", tiny / "model" / "small"):
        with pytest.raises(UserError, match="lies in, the source"):
            rewrite_checkpoint(tiny / "model", inside, [0, 7])
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    for here in (".", ".."):
        with pytest.raises(UserError, match="is a folder that is there already: name a new one"):
            rewrite_checkpoint(tiny / "model", Path(here), [0, 7])


def test_a_checkpoint_of_another_depth_than_its_config_is_refused(tmp_path: Path) -> None:
    make_model("llama", tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if ".layers.4." not in name},
        tmp_path / "model" / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(UserError, match=r"asks for 8 layers.*\[4\]"):
        rewrite_checkpoint(tmp_path / "model", tmp_path / "small", [0, 7])


def test_verify_finds_what_is_missing_and_what_is_too_much(tmp_path: Path) -> None:
    make_model("llama", tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.layers.3.extra"] = torch.zeros(2)
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(3, 3)
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"model\.norm\.weight is missing.*up_proj\.weight is \[3, 3\].*layers\.3\.extra is not asked"
    ):
        verify_checkpoint(tmp_path / "model")


@pytest.mark.unshare
@pytest.mark.skipif(not can_unshare(), reason="no mount namespaces here (unshare -rm)")
@pytest.mark.parametrize(
    ("options", "blind", "message"),
    [
        pytest.param("size=128k", False, "nothing was written", id="full, seen before the first byte"),
        pytest.param("size=128k", True, "no space left while writing", id="full, met in the middle"),
        pytest.param("ro", False, "may not write .*Read-only file system", id="read-only"),
    ],
)
def test_a_full_or_closed_disk_leaves_nothing_half_written(
    tiny: Path, tmp_path: Path, options: str, blind: bool, message: str
) -> None:
    """A small file system, and a rewrite that needs more; once with the check of the space made blind."""
    disk = tmp_path / "disk"
    disk.mkdir()
    script = tmp_path / "rewrite.py"
    blinding = "import mpruner_dist.rewriting.rewrite as r; r.require_space = lambda *_: None\n" if blind else ""
    script.write_text(
        f"{blinding}import sys\nfrom pathlib import Path\nfrom mpruner_dist.errors import StageFailure\n"
        "from mpruner_dist.rewriting.rewrite import rewrite_checkpoint\n"
        f"try:\n    rewrite_checkpoint(Path({str(tiny / 'model')!r}), Path({str(disk / 'small')!r}), list(range(7)))\n"
        "except StageFailure as error:\n    print(error)\n"
        f"print('target', Path({str(disk / 'small')!r}).exists())\n"
        f"print('tmp', list(Path({str(disk)!r}).rglob('*.tmp')))\n"
    )
    command = f'mount -t tmpfs -o {options} none "$1" && exec "$2" "$3"'
    done = subprocess.run(
        ["unshare", "-rm", "bash", "-c", command, "-", disk, sys.executable, script],
        capture_output=True, text=True, env=os.environ | {"DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    assert re.search(message, done.stdout), done.stdout + done.stderr
    assert "target False" in done.stdout
    assert "tmp []" in done.stdout


def test_verify_against_the_original_runs_both(tiny: Path, tmp_path: Path) -> None:
    rewrite_checkpoint(tiny / "model", tmp_path / "small", [0, 3, 7])
    assert compare_logits(tmp_path / "small", tiny / "model") < 1e-6
    shard = next((tmp_path / "small").glob("*.safetensors"))
    tensors = load_file(shard)
    save_file({name: tensor + 0.1 for name, tensor in tensors.items()}, shard, {"format": "pt"})
    with pytest.raises(StageFailure, match=r"does not compute what .* does with layers \[1, 2, 4, 5, 6\] skipped"):
        compare_logits(tmp_path / "small", tiny / "model")
    with pytest.raises(UserError, match=r"layer_map\.json does not say which layers"):
        compare_logits(tiny / "model", tiny / "model")


@pytest.mark.parametrize("size", [1, 30_000, 10**9])
def test_files_are_filled_up_to_a_size(tiny: Path, tmp_path: Path, size: int) -> None:
    rewrite_checkpoint(tiny / "model", tmp_path / "small", [0, 3, 7], max_shard_bytes=size)
    new = verify_checkpoint(tmp_path / "small")
    held = [sum(info.num_bytes for info in header.tensors.values()) for header in new.shards.values()]
    single = [len(header.tensors) == 1 for header in new.shards.values()]
    assert all(total <= size or alone for total, alone in zip(held, single, strict=True))
    assert len(held) == {1: len(new.tensors), 10**9: 1}.get(size, len(held))
    assert all(one + two > size for one, two in itertools.pairwise(held))


def test_a_finished_rewrite_is_left_alone_and_a_damaged_one_made_again(tiny: Path, tmp_path: Path) -> None:
    rewrite_checkpoint(tiny / "model", tmp_path / "small", [0, 3, 7])
    config = tmp_path / "small" / "config.json"
    before = config.stat().st_mtime_ns
    rewrite_checkpoint(tiny / "model", tmp_path / "small", [0, 3, 7])
    assert config.stat().st_mtime_ns == before
    left = [tmp_path / name for name in (".small.old", ".small.partial-12ab")]  # by rewrites that were killed
    for folder in left:
        folder.mkdir()
    rewrite_checkpoint(tiny / "model", tmp_path / "small", [0, 3, 7])
    assert not any(folder.exists() for folder in left)
    shard = next((tmp_path / "small").glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 1)
    rewrite_checkpoint(tiny / "model", tmp_path / "small", [0, 3, 7])
    assert config.stat().st_mtime_ns != before
    verify_checkpoint(tmp_path / "small")


def test_a_target_that_holds_the_source_is_refused(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny / "model", tmp_path / "all" / "model")
    (tmp_path / "all" / "layer_map.json").write_text("{}")
    with pytest.raises(UserError, match="holds the source"):
        rewrite_checkpoint(tmp_path / "all" / "model", tmp_path / "all", [0, 7])
    assert (tmp_path / "all" / "model" / "config.json").exists()


def test_with_another_tokenizer_it_is_another_rewrite(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny / "model", tmp_path / "model")
    for template in ("one", "two"):
        (tmp_path / "model/chat_template.jinja").write_text(template)
        rewrite_checkpoint(tmp_path / "model", tmp_path / "small", [0, 7])
        assert (tmp_path / "small/chat_template.jinja").read_text() == template


def test_a_rewritten_model_that_was_trained_since_is_not_replaced(tiny: Path, tmp_path: Path) -> None:
    rewrite_checkpoint(tiny / "model", tmp_path / "trained", [0, 3, 7])
    forget_request(tmp_path / "trained")
    assert json.loads((tmp_path / "trained/layer_map.json").read_text())["new_to_old"] == [0, 3, 7]
    for kept in ([0, 3, 7], [0, 7]):
        with pytest.raises(UserError, match="exists and is no rewritten checkpoint, or was trained since"):
            rewrite_checkpoint(tiny / "model", tmp_path / "trained", kept)


def test_links_as_hub_caches_have_them_are_followed(tiny: Path, tmp_path: Path) -> None:
    cache = tmp_path / "snapshot"
    cache.mkdir()
    for file in (tiny / "model").iterdir():
        (cache / file.name).symlink_to(file)
    rewrite_checkpoint(cache, tmp_path / "small", [0, 7])
    assert not any(file.is_symlink() for file in (tmp_path / "small").iterdir())
    verify_checkpoint(tmp_path / "small")


def test_a_fingerprint_sees_every_tensor(tmp_path: Path) -> None:
    """Also one that lies between the spots of a large file, as those that adapters change may all do."""
    make_model("llama", tmp_path)
    tensors = {f"model.layers.{n}.w": torch.zeros(300_000) for n in range(40)}
    save_file(tensors, tmp_path / "model.safetensors")
    seen = set()
    for number in range(40):
        save_file(tensors | {f"model.layers.{number}.w": torch.ones(300_000)}, tmp_path / "model.safetensors")
        checkpoint = read_checkpoint(tmp_path)
        seen.add(checkpoint.fingerprint())
        assert stored_safetensors(checkpoint).fingerprint() == checkpoint.fingerprint()
    assert len(seen) == 40
