"""The stage `data`: text to token blocks."""

from pathlib import Path

from mpruner_dist.config import SourceConfig
from mpruner_dist.logs import show_progress
from mpruner_dist.road import Road, Step
from mpruner_dist.runs.digest import spot_digest


def data(road: Road) -> Step:
    """Text to token blocks."""
    from mpruner_dist.data.needed import blocks_needed

    readers = [*road.source.glob("*token*"), *road.source.glob("preprocessor_config.json")]
    tokenizer = {file.name: spot_digest(file) for file in sorted(readers)}
    files = {part: source_digest(source) for part, source in road.config.data.parts().items()}
    inputs = {
        "task": road.config.model.task,
        "labels": road.checkpoint.config.get("id2label"),
        "padding": road.checkpoint.config.get("pad_token_id"),
        "tokenizer": tokenizer,
        "data": road.config.data.model_dump(mode="json"),
        "blocks": blocks_needed(road.config),
        "files": files,
    }

    def make() -> None:
        from mpruner_dist.data.prepare import prepare_data

        road.join_cluster()
        progress = road.folder / "logs/progress.json"
        with show_progress(progress):
            prepare_data(road.config, road.source, road.data, progress)

    return inputs, ("data/data.json",), make


def source_digest(source: SourceConfig) -> dict[str, str]:
    """Digests of the files that a source reads; none for a `datasets` id, which names its own content."""
    return digests_of_files(Path(source.path).expanduser())


def digests_of_files(path: Path) -> dict[str, str]:
    """Of a file, or of all files in a folder but those that Python leaves beside its own."""
    inside = sorted(file for file in path.rglob("*") if file.is_file() and file.parent.name != "__pycache__")
    files = [path] if path.is_file() else inside
    return {str(file): spot_digest(file) for file in files}
