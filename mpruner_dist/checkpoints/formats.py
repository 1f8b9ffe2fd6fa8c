"""What kind of checkpoint a folder holds."""

from pathlib import Path

from mpruner_dist.checkpoints.folder import read_checkpoint
from mpruner_dist.checkpoints.stored import StoredCheckpoint, stored_safetensors


def open_checkpoint(path: Path, config_folder: Path | None = None) -> StoredCheckpoint:
    """Open a checkpoint of any kind, without reading its tensors.

    Args:
        path: its folder.
        config_folder: where config.json and the tokenizer lie, if not there.

    Raises:
        UserError: it is of no known kind, or damaged.
    """
    return stored_safetensors(read_checkpoint(path))
