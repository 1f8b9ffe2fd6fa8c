"""What kind of checkpoint a folder holds."""

from pathlib import Path

from mpruner_dist.checkpoints.distcp import METADATA, distcp_tensors
from mpruner_dist.checkpoints.folder import (
    INDEX_NAME,
    SINGLE_NAME,
    read_checkpoint,
    read_config_json,
    shard_names,
)
from mpruner_dist.checkpoints.stored import StoredCheckpoint, StoredTensor, stored_safetensors
from mpruner_dist.checkpoints.torch_files import named_tensors, read_torch_file
from mpruner_dist.checkpoints.zero_files import step_folder, zero_tensors
from mpruner_dist.errors import UserError

BIN_INDEX, BIN_SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"


def open_checkpoint(path: Path, config_folder: Path | None = None) -> StoredCheckpoint:
    """Open a checkpoint of any kind, without reading its tensors.

    Args:
        path: its folder.
        config_folder: where config.json and the tokenizer lie, if not there.

    Raises:
        UserError: it is of no known kind, or damaged.
    """
    if not path.is_dir():
        raise UserError(f"the model folder {path} does not exist")
    if (path / INDEX_NAME).is_file() or (path / SINGLE_NAME).is_file():
        if config_folder is not None:
            raise UserError(f"--config is for weights without a config.json; {path} is a Hugging Face folder")
        return stored_safetensors(read_checkpoint(path))
    companions = config_folder or path
    if not (companions / "config.json").is_file():
        raise UserError(f"{companions} holds no config.json: say where it lies with --config, a Hugging Face folder")
    config = read_config_json(companions / "config.json")
    if (path / BIN_INDEX).is_file() or (path / BIN_SINGLE).is_file():
        return StoredCheckpoint(path, companions, config, _bin_files(path), {"format": "pt"})
    step = step_folder(path)
    if step is not None:
        return StoredCheckpoint(path, companions, config, {"": zero_tensors(step)}, {"format": "pt"}, keep_split=False)
    if (path / METADATA).is_file():
        return StoredCheckpoint(
            path, companions, config, {"": distcp_tensors(path)}, {"format": "pt"}, keep_split=False
        )
    raise UserError(
        f"{path} holds no weights that can be read: neither {SINGLE_NAME}, {INDEX_NAME}, {BIN_SINGLE} or {BIN_INDEX}, "
        f"nor the files of DeepSpeed (latest, *_model_states.pt) or of torch.distributed.checkpoint ({METADATA})"
    )


def _bin_files(path: Path) -> dict[str, dict[str, StoredTensor]]:
    """`pytorch_model.bin`, or the files of its index."""
    if (path / BIN_SINGLE).is_file():
        return {BIN_SINGLE: named_tensors(path / BIN_SINGLE, read_torch_file(path / BIN_SINGLE))}
    weight_map, names = shard_names(path / BIN_INDEX)
    files = {name: named_tensors(path / name, read_torch_file(path / name)) for name in names}
    found = {(tensor, name) for name, tensors in files.items() for tensor in tensors}
    lacking = sorted(set(weight_map.items()) - found)
    if lacking:
        raise UserError(f"{path / BIN_INDEX} names tensors that its files lack: {lacking[:3]}; fetch them again")
    return files
