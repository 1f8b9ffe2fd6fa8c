"""Images with classes: what the model is given is what lies in the files."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file
from test_images import CLASSES, some_images, write_idx

from mpruner_dist.config import SourceConfig
from mpruner_dist.data.images import LabelledImages, PixelFormat, make_images, pixel_format, read_idx
from mpruner_dist.data.parts import load_part, save_part
from mpruner_dist.data.sources import open_images
from mpruner_dist.errors import UserError
from mpruner_dist.tasks import TASKS

GREY = PixelFormat(1, None, (0.5,), (0.5,))


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
    assert form({"vision_config": {"image_size": 384, "num_channels": 1}}) == PixelFormat(1, (384, 384), (0.5,), (0.5,))
    assert form({}, {"image_mean": 0.25, "image_std": 1.0}) == PixelFormat(3, None, (0.25,) * 3, (1.0,) * 3)
    for unknown in ("do_flip_channel_order", "rescale_offset"):
        with pytest.raises(UserError, match=rf"preprocessor_config\.json asks for {unknown}, which is not known here"):
            form({}, {unknown: True})
    for broken in ("{", "[]"):
        (tmp_path / "preprocessor_config.json").write_text(broken)
        with pytest.raises(UserError, match=r"preprocessor_config\.json"):
            pixel_format(tmp_path)
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


def test_folders_of_classes_and_saved_images_are_read(tmp_path: Path) -> None:
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


def test_grey_of_all_kinds_stays_grey(tmp_path: Path) -> None:
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


def test_images_that_cannot_be_read_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dark, light = (tmp_path / "files" / name for name in CLASSES)
    dark.mkdir(parents=True)
    light.mkdir()
    Image.fromarray(some_images(1)[0][0]).save(dark / "0.png")
    (light / "0.png").write_bytes((dark / "0.png").read_bytes()[:40])
    source = SourceConfig(path=str(tmp_path / "files"), label_field="label")
    with pytest.raises(UserError, match=r"image of record 1 of .*files cannot be read: .*, in .*light/0\.png"):
        list(open_images(source, CLASSES)[0])
    whole = (dark / "0.png").read_bytes()
    behind_header = 8 + 25
    exif = b"eXIf" + b"no such header"
    chunk = (len(exif) - 4).to_bytes(4, "big") + exif + zlib.crc32(exif).to_bytes(4, "big")
    (light / "0.png").write_bytes(whole[:behind_header] + chunk + whole[behind_header:])
    with pytest.raises(UserError, match=r"image of record 1 of .*files cannot be read: .*, in .*light/0\.png"):
        list(open_images(source, CLASSES)[0])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    (light / "0.png").write_bytes(whole)
    with pytest.raises(UserError, match=r"image of record 0 of .*files cannot be read: Image size .* exceeds limit"):
        list(open_images(source, CLASSES)[0])
    monkeypatch.undo()
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


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 5), st.integers(1, 3), st.integers(1, 7))
def test_a_part_is_a_safetensors_file(tmp_path: Path, count: int, channels: int, width: int) -> None:
    draw = np.random.default_rng(count)
    pixels = draw.integers(0, 256, (count, channels, width, width)).astype(np.uint8).swapaxes(2, 3)  # not contiguous
    part = LabelledImages(
        pixels, np.arange(count, dtype=np.int32), np.zeros(channels, np.float32), np.ones(channels, np.float32)
    )
    save_part(tmp_path / "part.safetensors", part)
    read, expected = load_file(tmp_path / "part.safetensors"), part.tensors()
    assert read.keys() == expected.keys()
    for name, value in expected.items():
        assert read[name].dtype == value.dtype
        assert np.array_equal(read[name], value)
    assert np.array_equal(load_part(tmp_path / "part.safetensors").pixels, pixels)


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
