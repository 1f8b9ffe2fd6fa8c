"""A Hugging Face checkpoint folder: its configuration, its shards and what lies in them."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpruner_dist.checkpoints.header import Header, TensorInfo, read_header, unique_keys
from mpruner_dist.errors import UserError
from mpruner_dist.runs.digest import content_digest, digest, file_digest, spot_digest
from mpruner_dist.runs.json_files import read_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
FLOAT_TAG = "__float__"
TOKENIZERS = ("*token*", "*.spm", "*.model", "*.codes", "vocab.*", "merges.txt", "*processor_config.json", "*.jinja")
"""Names of files that say how data are read."""


@dataclass(frozen=True)
class CheckpointFolder:
    """A folder whose every shard has been found whole."""

    path: Path
    config: dict[str, Any]
    shards: dict[str, Header]
    """File name -> header, in the order of the names."""

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """All tensors by name."""
        return {name: info for header in self.shards.values() for name, info in header.tensors.items()}

    @property
    def num_parameters(self) -> int:
        """Stored elements; tied weights count once."""
        return sum(info.num_elements for info in self.tensors.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, headers left out."""
        return sum(info.num_bytes for info in self.tensors.values())

    def fingerprint(self) -> str:
        """Digest of what the model computes, see `fingerprint`."""
        names = {name: sorted(header.tensors) for name, header in self.shards.items()}
        middles = {
            self.path / name: [(info.begin + info.end) // 2 for info in header.tensors.values()]
            for name, header in self.shards.items()
        }
        return fingerprint(self.path, self.config, names, middles)


def fingerprint(
    companions: Path, config: dict[str, Any], names: dict[str, list[str]], places: Mapping[Path, Iterable[int]]
) -> str:
    """Digest of what a model computes, quick even at 140 GB.

    Args:
        companions: the folder of its configuration: code that lies there counts, and how texts are generated.
        config: the configuration.
        names: of the tensors, by file.
        places: of each file, where bytes are looked at beside those of `spot_digest`.
    """
    beside = [file for pattern in ("*.py", "generation_config.json") for file in sorted(companions.glob(pattern))]
    spots = [spot_digest(path, places[path]) for path in sorted(places)]
    return digest([config, {file.name: file_digest(file) for file in beside}, names, spots])


def tokenizer_digests(folder: Path) -> dict[str, str]:
    """Digests of the files beside a model that say how data are read, by name."""
    files = {file for pattern in TOKENIZERS for file in folder.glob(pattern) if file.is_file()}
    return {file.name: content_digest(file) for file in sorted(files)}


def read_checkpoint(path: Path) -> CheckpointFolder:
    """Open a checkpoint and check that it is whole: configuration, index, every shard's header and length.

    Raises:
        UserError: anything missing, truncated or contradictory, by name.
    """
    if not path.is_dir():
        raise UserError(f"the model folder {path} does not exist")
    config_path = path / "config.json"
    if not config_path.is_file():
        raise UserError(f"{path} holds no config.json: it is no Hugging Face model folder")
    config = read_config_json(config_path)
    if (path / SINGLE_NAME).is_file():  # beside an index, which is then left over, transformers takes it too
        return CheckpointFolder(path, config, {SINGLE_NAME: read_header(path / SINGLE_NAME)})
    index_path = path / INDEX_NAME
    if not index_path.is_file():
        raise UserError(
            f"{path} holds neither {INDEX_NAME} nor {SINGLE_NAME}: make a folder of safetensors of it "
            "first, by mpruner rewrite with all layers kept"
        )
    weight_map, names = shard_names(index_path)
    shards = {name: read_header(path / name) for name in names}
    _check_index(index_path, weight_map, shards)
    return CheckpointFolder(path, config, shards)


def shard_names(index_path: Path) -> tuple[dict[str, str], list[str]]:
    """The index of a checkpoint, tensor -> file, and its files, which are all there.

    Raises:
        UserError: no index, a file that is missing, or one outside the folder.
    """
    weight_map = read_json(index_path, unique_keys).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index_path} has no weight_map")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{index_path} names {name!r}, which is not a file of its own folder")
    names = sorted(set(weight_map.values()))
    for name in names:
        if not (index_path.parent / name).is_file():
            raise UserError(f"{index_path.parent} lacks the shard {name} that its index names; fetch it again")
    return weight_map, names


def _check_index(index_path: Path, weight_map: dict[str, str], shards: dict[str, Header]) -> None:
    found = {(tensor, name) for name, header in shards.items() for tensor in header.tensors}
    named = set(weight_map.items())
    if found != named:
        missing, extra = sorted(named - found)[:3], sorted(found - named)[:3]
        raise UserError(
            f"{index_path} and its shards disagree; only in the index: {missing}; only in the shards: {extra}"
        )


def read_config_json(path: Path) -> dict[str, Any]:
    """A model's config.json, with the infinite numbers that transformers 5 writes as {"__float__": "Infinity"}.

    Raises:
        UserError: unreadable, or something else.
    """
    config: dict[str, Any] = _with_floats(read_json(path))
    return config


def _with_floats(content: Any) -> Any:
    if isinstance(content, dict) and content.keys() == {FLOAT_TAG}:
        return float(content[FLOAT_TAG])
    if isinstance(content, dict):
        return {key: _with_floats(value) for key, value in content.items()}
    return [_with_floats(value) for value in content] if isinstance(content, list) else content


def with_tagged_floats(content: Any) -> Any:
    """A configuration as `read_config_json` reads it back: JSON has no infinite numbers."""
    if isinstance(content, float) and not math.isfinite(content):
        return {FLOAT_TAG: {math.inf: "Infinity", -math.inf: "-Infinity"}.get(content, "NaN")}
    if isinstance(content, dict):
        return {key: with_tagged_floats(value) for key, value in content.items()}
    return [with_tagged_floats(value) for value in content] if isinstance(content, list | tuple) else content


def shard_name(number: int, count: int) -> str:
    """Name of the number-th of `count` shards, counted from 1, as transformers writes it."""
    return SINGLE_NAME if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def index_json(shards: dict[str, Header]) -> dict[str, Any]:
    """Content of the index for these shards."""
    tensors = [info for header in shards.values() for info in header.tensors.values()]
    return {
        "metadata": {
            "total_parameters": sum(info.num_elements for info in tensors),
            "total_size": sum(info.num_bytes for info in tensors),
        },
        "weight_map": dict(sorted((tensor, name) for name, header in shards.items() for tensor in header.tensors)),
    }
