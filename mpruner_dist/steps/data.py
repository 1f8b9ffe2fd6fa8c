"""The stage `data`: text to token blocks, images to pixels, recordings to spectra."""

from pathlib import Path
from typing import Any

from mpruner_dist.checkpoints.folder import tokenizer_digests
from mpruner_dist.config import DataConfig, SourceConfig
from mpruner_dist.config.task import FACTS, TaskFacts
from mpruner_dist.logs import show_progress
from mpruner_dist.road import Road, Step
from mpruner_dist.runs.digest import content_digest


def data(road: Road) -> Step:
    """Sources to the blocks that the model is given."""
    from mpruner_dist.data.needed import blocks_needed

    files = {part: source_digest(source) for part, source in road.config.data.parts().items()}
    facts = FACTS[road.config.model.task]
    inputs = {
        "task": road.config.model.task,
        "labels": road.checkpoint.config.get("id2label"),
        "padding": road.checkpoint.config.get("pad_token_id"),
        "tokenizer": tokenizer_digests(road.source),
        "data": settings_read(road.config.data, facts),
        "blocks": blocks_needed(road.config),
        "files": files,
    }
    if facts.reads == "images":  # where the processor's file does not say
        names = ("num_channels", "image_size", "vision_config")
        inputs["pixels"] = {name: road.checkpoint.config.get(name) for name in names}
    if facts.of_generated:
        inputs["decoder_start"] = road.checkpoint.config.get("decoder_start_token_id")
    if facts.reads == "speech":
        fields = ("num_mel_bins", "max_source_positions", "max_target_positions")
        inputs["places"] = {name: road.checkpoint.config.get(name) for name in fields}
        for part, source in road.config.data.parts().items():
            files[part] |= recording_digests(source)

    def make() -> None:
        from mpruner_dist.data.prepare import prepare_data

        road.join_cluster()
        progress = road.folder / "logs/progress.json"
        with show_progress(progress):
            prepare_data(road.config, road.source, road.data, progress)

    return inputs, ("data/data.json",), make


def settings_read(config: DataConfig, facts: TaskFacts) -> dict[str, Any]:
    """The settings but those that a task does not read, which may change."""
    content = config.model_dump(mode="json")
    if not facts.of_generated:
        del content["target_size"]
    if facts.reads != "speech":
        del content["language"]
    unread = ([] if facts.of_generated else ["target_field"]) + ([] if facts.reads == "speech" else ["audio_field"])
    for part in config.parts():
        content[part] = {name: value for name, value in content[part].items() if name not in unread}
    return content


def source_digest(source: SourceConfig) -> dict[str, str]:
    """Digests of the files that a source reads; none for a `datasets` id, which names its own content."""
    return digests_of_files(Path(source.path).expanduser())


def recording_digests(source: SourceConfig) -> dict[str, str]:
    """Of the recordings that a file of paths names; those of a folder are digested with it."""
    from mpruner_dist.data.sources import recording_files

    if not Path(source.path).expanduser().is_file():
        return {}
    return {str(file): content_digest(file) for file in recording_files(source)}


def digests_of_files(path: Path) -> dict[str, str]:
    """Of a file, or of all files in a folder but those that Python leaves beside its own."""
    inside = sorted(file for file in path.rglob("*") if file.is_file() and file.parent.name != "__pycache__")
    files = [path] if path.is_file() else inside
    return {str(file): content_digest(file) for file in files}
