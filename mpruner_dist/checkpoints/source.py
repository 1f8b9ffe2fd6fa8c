"""From `model.path` to a folder on this machine."""

from pathlib import Path

from mpruner_dist.errors import UserError, first_line

COMPANIONS = ["*.json", "*.model", "*.txt", "*.jinja", "*.py", "*.spm", "*.codes", "*.tiktoken"]


def resolve_source(path: str, revision: str | None) -> Path:
    """The local folder of a model: the folder itself, or the files of a hub id, fetched.

    Raises:
        UserError: no such folder, and no hub id that can be reached.
    """
    folder = Path(path).expanduser()
    if folder.exists():
        return folder.absolute()
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise UserError(f"model {path!r}: there is no such folder, and it is no hub id such as owner/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        fetched = Path(snapshot_download(path, revision=revision, allow_patterns=[*COMPANIONS, "*.safetensors"]))
        if not any(fetched.glob("*.safetensors")):  # many repositories have both: the older form only if need be
            older = [*COMPANIONS, "pytorch_model*.bin"]
            fetched = Path(snapshot_download(path, revision=revision, allow_patterns=older))
        return fetched
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        told = first_line(error)
        raise UserError(f"model {path!r} is no folder here, and the hub does not give it: {told}") from error
