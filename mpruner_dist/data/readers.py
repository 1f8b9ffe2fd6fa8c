"""How each task reads its data: from records of a source to a part."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

import transformers

from mpruner_dist.config import Config, DataConfig, SourceConfig
from mpruner_dist.data.blocks import Blocks, make_blocks
from mpruner_dist.data.images import LabelledImages, PixelFormat, make_images, pixel_format
from mpruner_dist.data.labelled import LabelledTexts, label_names, make_labelled
from mpruner_dist.data.model_folder import load_tokenizer, read_config
from mpruner_dist.data.pairs import Pairs, make_pairs
from mpruner_dist.data.sources import open_images, open_labelled, open_pairs, open_source, open_speech
from mpruner_dist.data.speech import Ear, Speech, Speller, make_speech
from mpruner_dist.errors import UserError

R = TypeVar("R")


class Watch(Protocol):
    """Looks at the records as they go by."""

    def __call__(self, records: Iterable[R], number: int, content: Callable[[R], str]) -> Iterator[R]:
        """The same records; their number, if all are read, and what each of them says."""


class Reader(Protocol):
    """What makes parts of one task's data."""

    unit: str
    """What a part is so many of."""

    def read(self, source: SourceConfig, limit: int | None, watch: Watch) -> Any:
        """A part of at most `limit` rows.

        Raises:
            UserError: a source that cannot be read.
        """

    def facts(self, part: Any) -> dict[str, Any]:
        """What `data.json` says of a part, beside its number of rows."""


class BlockReader:
    """Blocks of tokens, for causal-lm."""

    def __init__(self, config: DataConfig, tokenizer: Any) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.unit = f"blocks of {config.block_size} tokens"

    def read(self, source: SourceConfig, limit: int | None, watch: Watch) -> Blocks:
        """Text as it runs, or a block a record."""
        records, number, separator = open_source(source)
        watched = watch(records, number, str)
        return make_blocks(watched, self.tokenizer, self.config.block_size, self.config.pack, separator, limit)

    def facts(self, part: Blocks) -> dict[str, Any]:
        """The number of tokens."""
        return {"tokens": int(part.lengths.sum())}


class LabelledReader:
    """Texts with a class each, for text-classification."""

    unit = "labelled texts"

    def __init__(self, config: DataConfig, tokenizer: Any, labels: list[str], pad: int) -> None:
        self.config, self.tokenizer, self.labels, self.pad = config, tokenizer, labels, pad

    def read(self, source: SourceConfig, limit: int | None, watch: Watch) -> LabelledTexts:
        """A row a record."""
        records, number = open_labelled(source, self.labels)
        watched = watch(records, number, lambda record: record[0])
        return make_labelled(watched, self.tokenizer, self.config.block_size, limit, self.pad)

    def facts(self, part: LabelledTexts) -> dict[str, Any]:
        """The number of tokens, and of the texts of each class."""
        return {"tokens": int(part.lengths.sum()), "labels": of_classes(part, self.labels)}


class PairReader:
    """Texts and what should be said of each, for sequence-to-sequence."""

    unit = "pairs of texts"

    def __init__(self, config: DataConfig, tokenizer: Any, pad: int, start: int) -> None:
        self.tokenizer, self.pad, self.start = tokenizer, pad, start
        self.longest = (config.block_size, config.target_size or config.block_size)

    def read(self, source: SourceConfig, limit: int | None, watch: Watch) -> Pairs:
        """A row a record."""
        records, number = open_pairs(source)
        watched = watch(records, number, lambda record: record[0])
        return make_pairs(watched, self.tokenizer, self.longest, limit, self.pad, self.start)

    def facts(self, part: Pairs) -> dict[str, Any]:
        """The number of tokens, read and to be said."""
        return {"tokens": int(part.lengths.sum() + (part.target_lengths - 1).sum())}


class SpeechReader:
    """Recordings and what is said in them, for automatic-speech-recognition."""

    unit = "recordings"

    def __init__(self, ear: Ear, speller: Speller, pad: int) -> None:
        self.ear, self.speller, self.pad = ear, speller, pad

    def read(self, source: SourceConfig, limit: int | None, watch: Watch) -> Speech:
        """A row a record."""
        records, number = open_speech(source)
        heard = ((self.ear.load(found, where), text) for found, text, where in records)
        watched = watch(heard, number, lambda record: hashlib.sha256(record[0].tobytes()).hexdigest())
        most = number if limit is None else min(limit, number)
        return make_speech(watched, self.ear, self.speller, most, self.pad, source.path)

    def facts(self, part: Speech) -> dict[str, Any]:
        """How many tokens are to be said, and how many places of the encoder hold sound."""
        return {"tokens": int(part.lengths.sum() + (part.target_lengths - part.prompt).sum())}


class ImageReader:
    """Images with a class each, for image-classification."""

    unit = "labelled images"

    def __init__(self, form: PixelFormat, labels: list[str]) -> None:
        self.form, self.labels = form, labels

    def read(self, source: SourceConfig, limit: int | None, watch: Watch) -> LabelledImages:
        """An image a record, in the model's size."""
        records, number = open_images(source, self.labels)
        watched = watch(records, number, lambda record: hashlib.sha256(record[0].tobytes()).hexdigest())
        return make_images(watched, self.form, source.path, number if limit is None else min(limit, number))

    def facts(self, part: LabelledImages) -> dict[str, Any]:
        """The number of images of each class."""
        return {"labels": of_classes(part, self.labels)}


def of_classes(part: LabelledTexts | LabelledImages, labels: list[str]) -> dict[str, int]:
    """How many there are of each class."""
    counts = Counter(part.labels.tolist())
    return {name: counts[number] for number, name in enumerate(labels)}


def make_reader(config: Config, model_folder: Path) -> Reader:
    """The reader of the model's task.

    Raises:
        UserError: the model's folder lacks what it needs.
    """
    if config.model.task == "image-classification":
        return ImageReader(pixel_format(model_folder), label_names(model_folder))
    trusted = config.model.trust_remote_code
    tokenizer = load_tokenizer(model_folder, trusted)
    if config.model.task == "causal-lm":
        return BlockReader(config.data, tokenizer)
    if config.model.task == "sequence-to-sequence":
        require_one_language(tokenizer, model_folder)
        return PairReader(config.data, tokenizer, *decoder_tokens(model_folder, trusted))
    if config.model.task == "automatic-speech-recognition":
        model, (pad, _) = read_config(model_folder, trusted), decoder_tokens(model_folder, trusted)
        speller = Speller(tokenizer, config.data.language, config.data.target_size, model)
        return SpeechReader(Ear(model_folder), speller, pad)
    pad = padding_token(model_folder, trusted)
    return LabelledReader(config.data, tokenizer, label_names(model_folder), pad)


def padding_token(folder: Path, trust_remote_code: bool) -> int:
    """The token that a classifier of texts takes for padding: its own, whatever the tokenizer's.

    A decoder says the class at the last token that is another one, so it must know it; an encoder goes by the mask.

    Raises:
        UserError: a decoder's configuration names none, or transformers cannot read it.
    """
    config = read_config(folder, trust_remote_code)
    pad = config.get_text_config().pad_token_id
    if pad is not None and pad >= 0:
        return int(pad)
    if type(config) in transformers.AutoModelForMaskedLM._model_mapping:
        return 0
    raise UserError(
        f"{folder}/config.json has the pad_token_id {pad}, and a decoder finds the end of a text by it: set "
        "pad_token_id to the token that it was trained to be padded with"
    )


def require_one_language(tokenizer: Any, folder: Path) -> None:
    """Refuse what would be told the language of its targets by a token, which nothing here names.

    Raises:
        UserError: a translator between many languages.
    """
    if hasattr(tokenizer, "set_tgt_lang_special_tokens"):
        raise UserError(
            f"{folder} translates between many languages ({type(tokenizer).__name__}), and is told which by a token: "
            "such models cannot be run yet; `mpruner rewrite` prunes them without a run"
        )


def decoder_tokens(folder: Path, trust_remote_code: bool) -> tuple[int, int]:
    """The token that fills rows, and the one that a decoder begins with.

    Raises:
        UserError: the model's configuration does not name both.
    """
    config = read_config(folder, trust_remote_code)
    pad, start = (getattr(config, name, None) for name in ("pad_token_id", "decoder_start_token_id"))
    if pad is None or start is None:
        raise UserError(
            f"{folder}/config.json has the pad_token_id {pad} and the decoder_start_token_id {start}: "
            "what generates text needs both; set them to the tokens that the model was trained with"
        )
    return int(pad), int(start)
