"""Images with classes: what the model is given is what lies in the files; and a vision model on the whole road."""

import gzip
import json
import struct
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from conftest import settings_for, write_config
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from mpruner_dist.config import Config, SourceConfig
from mpruner_dist.data.images import LabelledImages, PixelFormat, make_images, pixel_format, read_idx
from mpruner_dist.data.parts import load_part, save_part
from mpruner_dist.data.sources import open_images
from mpruner_dist.errors import UserError
from mpruner_dist.rewriting.proof import verify_checkpoint
from mpruner_dist.tasks import TASKS

Run = Callable[..., tuple[int, str]]
CLASSES = ["dark", "light"]
GREY = PixelFormat(1, None, (0.5,), (0.5,))
pillow = pytest.mark.skipif(find_spec("PIL") is None, reason="needs the extra vision")


def write_idx(path: Path, values: np.ndarray) -> None:
    content = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def some_images(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Noise, brighter where the class is 1."""
    draw = np.random.default_rng(seed)
    labels = (np.arange(count) % 2).astype(np.uint8)
    return (draw.integers(0, 160, (count, 8, 8)) + 90 * labels[:, None, None]).astype(np.uint8), labels


@pytest.fixture(scope="module")
def idx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("idx")
    for prefix, count, ending in (("train", 200, ".gz"), ("t10k", 60, "")):
        pixels, labels = some_images(count, seed=count)
        write_idx(folder / f"{prefix}-images-idx3-ubyte{ending}", pixels)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{ending}", labels)
    return folder


def test_idx_files_are_read_by_split_and_share(idx: Path) -> None:
    pixels, labels = some_images(200, seed=200)
    records, number = open_images(SourceConfig(path=str(idx), take=(0.25, 0.5)), CLASSES)
    found = list(records)
    assert number == len(found) == 50
    assert all((image == pixels[50 + row]).all() for row, (image, _) in enumerate(found))
    assert [label for _, label in found] == labels[50:100].tolist()
    assert open_images(SourceConfig(path=str(idx), split="test"), CLASSES)[1] == 60
    with pytest.raises(UserError, match="no class of the model"):
        list(open_images(SourceConfig(path=str(idx)), CLASSES[:1])[0])


def settings_of_images(folder: Path, idx: Path) -> dict[str, Any]:
    """A configuration that prunes and retrains `model` of a folder on these images."""
    asked = settings_for(folder)
    asked["model"]["task"] = "image-classification"
    asked["data"] = {
        "calibration": {"path": str(idx), "take": [0, 0.3]},
        "train": {"path": str(idx), "take": [0.3, 0.8]},
        "validation": {"path": str(idx), "take": [0.8, 1]},
        "test": {"path": str(idx), "split": "test"},
    }
    asked["collect"] |= {"unit": "image", "batch_size": 10, "num_batches": 6}
    return asked


@pytest.mark.parametrize(
    "spoil", [lambda c: c[:-1], lambda c: c[:3], lambda c: b"\1" + c[1:], lambda c: b"", lambda c: c + b"x"]
)
def test_a_damaged_idx_file_is_refused_by_name(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "some-idx3-ubyte"
    write_idx(path, some_images(3)[0])
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(UserError, match=r"some-idx3-ubyte is no whole IDX file"):
        read_idx(path)


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3]))
def test_an_image_has_the_models_channels_and_keeps_its_pixels(
    channels: int, height: int, width: int, asked: int
) -> None:
    image = np.random.default_rng(0).integers(0, 256, (height, width, channels)).astype(np.uint8)
    form = PixelFormat(asked, None, (0.5,) * asked, (0.5,) * asked)
    if channels not in (1, asked) and (channels, asked) != (4, 3):
        with pytest.raises(UserError, match=f"x has {channels} channels, the model takes {asked}"):
            form.fit(image, "x")
        return
    fitted = form.fit(image, "x")
    assert fitted.shape == (asked, height, width)
    for channel in range(asked):
        assert (fitted[channel] == image[:, :, 0 if channels == 1 else channel]).all()


def test_other_sizes_are_scaled() -> None:
    form = PixelFormat(1, (4, 4), (0.5,), (0.5,))
    halves = np.repeat([[10, 10, 10, 10, 200, 200, 200, 200]], 8, 0).astype(np.uint8)
    fitted = form.fit(halves, "x")
    assert fitted.shape == (1, 4, 4)
    assert np.abs(fitted[0].astype(int) - [10, 10, 200, 200]).max() <= 30  # antialiasing mixes at the edge
    assert fitted[0, 0, 0] == 10


def test_the_format_is_the_models(tmp_path: Path) -> None:
    def form(config: dict[str, Any], processor: dict[str, Any] | None = None) -> PixelFormat:
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "preprocessor_config.json").unlink(missing_ok=True)
        if processor is not None:
            (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
        return pixel_format(tmp_path)

    assert form({"num_channels": 1, "image_size": 28}) == PixelFormat(1, (28, 28), (0.5,), (0.5,))
    scaled = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "size": {"height": 16, "width": 24}}
    assert form({}, scaled) == PixelFormat(3, (16, 24), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert form({}, {"size": {"shortest_edge": 32}}).size == (32, 32)
    assert form({}).size is None
    assert form({}, {"size": 224}).size == (224, 224)
    dinov2 = {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}
    assert form({"image_size": 518}, dinov2).size == (224, 224)
    assert form({"image_size": 30}, {"size": {"longest_edge": 20}}).size == (30, 30)
    assert form({}, scaled | {"do_normalize": False}) == PixelFormat(3, (16, 24), (0.0,) * 3, (1.0,) * 3)
    assert form({}, dinov2 | {"do_center_crop": False}).size == (256, 256)
    # pixels as they are, and from 0 to 2: what is left of them is the same for all
    for options in ({"do_rescale": False}, {"rescale_factor": 2 / 255}):
        asked = {"image_mean": [1.0], "image_std": [4.0], "size": 8, **options}
        made, highest = form({"num_channels": 1}, asked), 255 if "do_rescale" in options else 2
        assert (255 / 255 - made.mean[0]) / made.std[0] == pytest.approx((highest - 1) / 4)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": scaled}))
    assert pixel_format(tmp_path) == PixelFormat(3, (16, 24), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    with pytest.raises(UserError, match="scales 3 channels, the model has 1"):
        form({"num_channels": 1}, scaled)


def test_images_of_several_sizes_need_a_size() -> None:
    records = [(np.zeros((4, 4), np.uint8), 0), (np.zeros((4, 5), np.uint8), 0)]
    with pytest.raises(UserError, match="images of several sizes"):
        make_images(records, GREY, "somewhere", 2)


def test_pixels_reach_the_model_scaled(tmp_path: Path) -> None:
    pixels, labels = some_images(3)
    form = PixelFormat(1, None, (0.25,), (0.5,))
    part = make_images(zip(pixels, labels.tolist(), strict=True), form, "here", 5)  # there are only three
    save_part(tmp_path / "part.safetensors", part)
    read = load_part(tmp_path / "part.safetensors")
    assert isinstance(read, LabelledImages)
    assert len(read) == 3
    assert isinstance(read.pixels, np.memmap)  # in the file
    assert not isinstance(read.rows([2, 0]).pixels, np.memmap)  # in memory
    batch = TASKS["image-classification"].batch(read.rows([2, 0]), torch.device("cpu"))
    expected = (torch.from_numpy(pixels[[2, 0]]).float() / 255 - 0.25) / 0.5
    torch.testing.assert_close(batch.inputs["pixel_values"], expected[:, None])
    assert batch.targets.tolist() == [0, 0]


@pillow
def test_folders_of_classes_and_saved_images_are_read(tmp_path: Path) -> None:
    from PIL import Image

    pixels, labels = some_images(6)
    for row, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        folder = tmp_path / "files" / CLASSES[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{row}.png")
    found = list(open_images(SourceConfig(path=str(tmp_path / "files")), CLASSES)[0])
    assert sorted((image.tobytes(), label) for image, label in found) == sorted(
        (image.tobytes(), int(label)) for image, label in zip(pixels, labels, strict=True)
    )
    records, _ = open_images(SourceConfig(path=str(tmp_path / "files")), CLASSES[::-1])
    assert next(records)[1] == 1  # by name
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    table = {"image": [Image.fromarray(image) for image in pixels], "label": labels.tolist()}
    datasets.Dataset.from_dict(table, features=features).save_to_disk(tmp_path / "saved")
    saved = list(open_images(SourceConfig(path=str(tmp_path / "saved")), CLASSES)[0])
    assert all((image == pixels[row]).all() for row, (image, _) in enumerate(saved))


@pillow
def test_grey_of_all_kinds_stays_grey(tmp_path: Path) -> None:
    from PIL import Image

    def read(image: Any, name: str) -> np.ndarray:
        for folder in CLASSES:  # of one class alone `datasets` makes no label
            (tmp_path / name / folder).mkdir(parents=True)
            image.save(tmp_path / name / folder / "0.png")
        found: np.ndarray = next(open_images(SourceConfig(path=str(tmp_path / name)), CLASSES)[0])[0]
        return found

    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    assert (read(Image.fromarray(ramp), "deep") == ramp >> 8).all()
    halves = np.repeat([[0, 255]], 4, 0).astype(np.uint8)
    assert (read(Image.fromarray(halves).convert("1"), "bits") == halves).all()
    assert (read(Image.fromarray(halves).convert("LA"), "clear") == halves).all()


@pillow
def test_images_that_cannot_be_read_are_refused_by_name(tmp_path: Path) -> None:
    from PIL import Image

    dark, light = (tmp_path / "files" / name for name in CLASSES)
    dark.mkdir(parents=True)
    light.mkdir()
    Image.fromarray(some_images(1)[0][0]).save(dark / "0.png")
    (light / "0.png").write_bytes((dark / "0.png").read_bytes()[:40])
    source = SourceConfig(path=str(tmp_path / "files"), label_field="label")
    with pytest.raises(UserError, match=r"image of record 1 of .*files cannot be read: .*, in .*light/0\.png"):
        list(open_images(source, CLASSES)[0])
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    table = datasets.Dataset.from_dict({"image": [None], "label": [0]}, features=features)
    table.save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match=r"image of record 0 of .*saved is missing"):
        list(open_images(SourceConfig(path=str(tmp_path / "saved")), CLASSES)[0])
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "0.tiff")
    table = datasets.Dataset.from_dict({"image": [str(tmp_path / "0.tiff")], "label": [0]}, features=features)
    table.save_to_disk(tmp_path / "floats")
    with pytest.raises(UserError, match="an image of Pillow's mode F, whose pixels have no known range"):
        list(open_images(SourceConfig(path=str(tmp_path / "floats")), CLASSES)[0])


def test_a_gzipped_idx_file_with_a_changed_byte_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "some-idx3-ubyte.gz"
    write_idx(path, some_images(3)[0])
    content = path.read_bytes()
    for place in range(12, len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        with pytest.raises(UserError, match=r"some-idx3-ubyte\.gz is no whole IDX file"):
            read_idx(path)


def test_a_field_without_images_is_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"image": ["a"], "label": [0]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match=r"image of .*saved holds no images"):
        open_images(SourceConfig(path=str(tmp_path / "saved")), CLASSES)


def test_images_are_compared_as_images() -> None:
    data = {part: {"path": part} for part in ("calibration", "test")}
    with pytest.raises(ValueError, match=r"collect.unit token is not measured with model.task image-class.*set image"):
        Config.model_validate({"model": {"path": "m", "task": "image-classification"}, "data": data})


@pytest.mark.ray
def test_a_vision_model_is_pruned_retrained_and_measured(idx: Path, tmp_path: Path, mpruner: Run) -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=6, image_size=8, patch_size=4,
        num_channels=1, id2label=dict(enumerate(CLASSES)), label2id={name: n for n, name in enumerate(CLASSES)},
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.3)
            if ".3." in name and ("o_proj" in name or "fc2" in name or "output.dense" in name):
                parameter.mul_(1e-3)
    model.eval().save_pretrained(tmp_path / "model")
    asked = settings_of_images(tmp_path, idx)
    asked["plan"]["keep_layers"] = 5
    asked["retrain"] |= {"steps": 8, "batch_size": 8}
    asked["retrain"]["distillation"] = {"weight": 0.3, "hidden_weight": 0.2}
    code, output = mpruner("run", write_config(tmp_path / "config.yaml", asked), "--run-dir", tmp_path / "run")
    assert code == 0, output
    run = tmp_path / "run"
    assert json.loads((run / "plan.json").read_text())["dropped"] == [3]
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["retrained"]["loss"] < evaluation["pruned"]["loss"]
    part = load_part(run / "data/test.safetensors")
    pixels = (torch.from_numpy(part.pixels).float() / 255 - 0.5) / 0.5
    for label, source in (("original", tmp_path / "model"), ("retrained", run / "retrained")):
        verify_checkpoint(source)
        model = transformers.AutoModelForImageClassification.from_pretrained(source).eval()
        with torch.no_grad():
            logits = model(pixel_values=pixels).logits
        labels = torch.from_numpy(part.labels).long()
        loss = float(torch.nn.functional.cross_entropy(logits, labels))
        assert evaluation[label]["loss"] == pytest.approx(loss, rel=1e-4)
        assert evaluation[label]["accuracy"] == pytest.approx(float((logits.argmax(-1) == labels).float().mean()))
    assert json.loads((run / "cka.json").read_text())["num_samples"] == 60
    assert "images/s" in output
    page = (run / "report.html").read_text()
    assert "6 batches of 10 images" in page
    assert "AutoTokenizer" not in (run / "pruned/README.md").read_text()
    code, output = mpruner("run", tmp_path / "config.yaml", "--run-dir", tmp_path / "dry", "--dry-run")
    assert code == 0, output
    assert "6 batches of 10 images" in " ".join(output.split())


def make_resnet(folder: Path, idle: list[tuple[int, int]]) -> None:
    """A residual network of three stages; some blocks, by stage and number, do almost nothing."""
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 16, 16], depths=[3, 4, 3], layer_type="basic",
        id2label=dict(enumerate(CLASSES)), label2id={name: n for n, name in enumerate(CLASSES)},
    )  # fmt: skip
    model = transformers.ResNetForImageClassification(config).train()
    pixels = torch.from_numpy(some_images(64)[0]).float()[:, None] / 255
    with torch.no_grad():
        for stage, block in idle:
            layer = model.resnet.encoder.stages[stage].layers[block].layer[-1]
            layer.normalization.weight.mul_(1e-3)
        for _ in range(30):  # running means of these images
            model(pixel_values=(pixels - 0.5) / 0.5)
    model.eval().save_pretrained(folder)


@pytest.mark.ray
def test_the_stages_of_a_cnn_are_pruned_apart(idx: Path, tmp_path: Path, mpruner: Run) -> None:
    """Layers count from the first stage to the last; the first of a stage stays, and so does each stage's own plan."""
    make_resnet(tmp_path / "model", [(0, 1), (1, 2), (2, 1)])
    asked = settings_of_images(tmp_path, idx)
    asked["plan"] = {"method": "anchor", "threshold": 0.9999, "protect_last": 0}
    asked["retrain"] |= {"steps": 30, "batch_size": 16, "micro_batch_size": 8, "learning_rate": 3e-3, "save_every": 30}
    asked["evaluate"] = {"batch_size": 20}
    asked["retrain"]["distillation"] = {"weight": 0.2, "hidden_weight": 0.1}
    config = write_config(tmp_path / "config.yaml", asked)
    code, output = mpruner("run", config, "--run-dir", tmp_path / "run", "--set", "cluster.workers=2")
    assert code == 0, output
    run = tmp_path / "run"
    plan = json.loads((run / "plan.json").read_text())
    assert plan["dropped"] == [1, 5, 8]
    similarity = json.loads((run / "cka.json").read_text())
    assert list(similarity["stacks"].values()) == [3, 4, 3]
    assert similarity["layers"][3] == "resnet.encoder.stages.1.layers.0"
    model = transformers.AutoModelForImageClassification.from_pretrained(run / "retrained").eval()
    assert model.config.depths == [2, 3, 2]
    verify_checkpoint(run / "retrained")
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert [entry["layers"] for entry in evaluation.values()] == [10, 7, 7]
    assert evaluation["pruned"]["loss"] == pytest.approx(evaluation["original"]["loss"], rel=0.05)
    assert evaluation["retrained"]["loss"] < evaluation["pruned"]["loss"]
    part = load_part(run / "data/test.safetensors")
    pixels = (torch.from_numpy(part.pixels).float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        logits = model(pixel_values=pixels).logits
    loss = float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(part.labels).long()))
    assert evaluation["retrained"]["loss"] == pytest.approx(loss, rel=1e-4)
    before, after = (load_file(run / name / "model.safetensors") for name in ("pruned", "retrained"))
    means = [name for name in before if name.endswith("running_mean")]
    assert means
    assert all(not torch.equal(before[name], after[name]) for name in means)  # what was gathered is exported
