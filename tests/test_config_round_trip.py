"""A configuration written as YAML is read back as the same, whatever field it sets."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from configurations import data, full, load, minimal

from mpruner_dist.config import Config
from mpruner_dist.config.base import Section

TASK = {"name": "mine", "metric": "acc", "folder": "tasks", "fewshot": 2, "limit": 9}
EVERY = {
    "minimal": minimal(),
    "full": full(),
    "speech": {
        "model": {"path": "m", "task": "automatic-speech-recognition"},
        "data": data(audio_field="sound", target_field="said") | {"language": "english", "target_size": 9},
    },
    "images": {
        "model": {"path": "m", "task": "image-classification"},
        "data": data(image_field="picture", label_field="kind"),
        "collect": {"unit": "image"},
        "plan": {"keep": "last", "preserve_pattern": True},
    },
    "rounds": {
        "model": {"path": "m"},
        "data": data(),
        "plan": {"method": "greedy", "keep_layers": 4, "judge_blocks": 7},
        "retrain": {"keep_checkpoints": 1, "distillation": {"top_k": 5, "cache": True}},
        "rounds": {"tolerance": 0.1, "metric": "task", "task": TASK, "remove": 2, "max_rounds": 3, "max_stride": 2},
        "evaluate": {"tasks": [TASK]},
    },
    "search": {
        "model": {"path": "m"},
        "data": data(),
        "plan": {"method": "search", "passes": 9, "seed": 3, "target_parameters": 10},
    },
    "file": {"model": {"path": "m"}, "data": data(), "plan": {"method": "file", "file": "plan.json"}},
}  # fmt: skip


@pytest.mark.parametrize("content", EVERY.values(), ids=EVERY)
def test_to_yaml_is_the_same_configuration(tmp_path: Path, content: dict[str, Any]) -> None:
    config = load(tmp_path, content)
    text = config.to_yaml()
    assert load(tmp_path, text) == config
    assert load(tmp_path, text).to_yaml() == text
    written = yaml.safe_load(text)
    assert set(written) == set(Config.model_fields)
    assert written["collect"].keys() == type(config.collect).model_fields.keys()  # defaults included


def said(section: Section) -> set[tuple[type, str]]:
    """The fields of a section, and of those in it, that are not at their defaults."""
    found = set()
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if value != field.get_default():
            found.add((type(section), name))
        for inner in value if isinstance(value, tuple) else (value,):
            found |= said(inner) if isinstance(inner, Section) else set()
    return found


def test_together_they_say_something_of_every_field(tmp_path: Path) -> None:
    """So that the round trip above would notice a field that is not written."""
    fields = {(kind, name) for kind in Section.__subclasses__() for name in kind.model_fields}
    assert fields - set.union(*(said(load(tmp_path, content)) for content in EVERY.values())) == set()
