"""Recordings with what is said in each: a spectrum and a row of tokens a record."""

import io
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import transformers

from mpruner_dist.data.blocks import Ints, mask_of, padded
from mpruner_dist.data.pairs import Targets
from mpruner_dist.errors import UserError

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Speech(Targets):
    """Spectra [recordings, bands, frames], as the model hears them, and what should be said.

    `lengths` [recordings], int32: how many of the encoder's places hold sound, the rest is the silence that fills each
    recording up. `prompt_ids`: what each target begins with, such as <|startoftranscript|><|en|>.
    """

    features: Floats
    lengths: Ints
    target_ids: Ints
    target_lengths: Ints
    prompt_ids: Ints
    positions: Ints
    """One number: the places that an encoder makes of the frames."""

    @property
    def prompt(self) -> int:  # type: ignore[override]
        """With so many tokens each target begins alike."""
        return len(self.prompt_ids)

    def __len__(self) -> int:
        return len(self.features)

    def rows(self, rows: Iterable[int]) -> "Speech":
        """The given recordings, in the given order; targets are padded only to the longest of them."""
        chosen = list(rows)
        said = self.target_rows(chosen)
        return Speech(self.features[chosen], self.lengths[chosen], *said, self.prompt_ids, self.positions)

    def masks(self) -> list[npt.NDArray[np.int64]]:
        """Of the encoder's places and the decoder's."""
        return [mask_of(self.lengths, int(self.positions[0])), self.target_mask()]

    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        """What is written to disk."""
        heard = {"features": self.features, "lengths": self.lengths}
        return heard | self.target_tensors() | {"prompt_ids": self.prompt_ids, "positions": self.positions}


class Ear:
    """What a model makes of sound, as its preprocessor_config.json says, before its encoder.

    Raises:
        UserError: it hears otherwise than Whisper: spectra of a fixed length.
    """

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        try:
            self.extractor: Any = transformers.AutoFeatureExtractor.from_pretrained(folder)
            self.rate, frames = int(self.extractor.sampling_rate), int(self.extractor.nb_max_frames)
            self.positions = int(config["max_source_positions"])
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise UserError(
                f"{folder} does not say how a model such as Whisper hears: it needs a preprocessor_config.json with a "
                f"WhisperFeatureExtractor, and max_source_positions in its config.json ({error})"
            ) from error
        self.bands, self.longest = int(self.extractor.feature_size), int(self.extractor.n_samples)
        self.shape = (self.bands, frames)
        self.step = frames // self.positions
        if self.step * self.positions != frames or config.get("num_mel_bins", self.bands) != self.bands:
            raise UserError(
                f"{folder}/preprocessor_config.json makes {self.bands} bands x {frames} frames of a recording, and the "
                f"model in config.json takes {config.get('num_mel_bins')} x a multiple of {self.positions}: correct "
                "feature_size and chunk_length"
            )

    def load(self, recording: bytes | Path, where: str) -> Floats:
        """The samples of a recording in any format that libsndfile reads, in one channel, at the model's rate.

        Raises:
            UserError: it is none, or empty.
        """
        import soundfile
        import soxr

        try:
            opened = io.BytesIO(recording) if isinstance(recording, bytes) else recording
            samples, rate = soundfile.read(opened, dtype="float32", always_2d=True)
        except (OSError, soundfile.SoundFileError) as error:
            raise UserError(f"{where} is no recording that can be read: {error}") from error
        if not len(samples):
            raise UserError(f"{where} is empty: take it out")
        heard: Floats = soxr.resample(samples.mean(1), rate, self.rate)
        return heard

    def spectrum(self, samples: Floats) -> tuple[Floats, int]:
        """As the model hears it, [bands, frames], and how many of the encoder's places hold sound."""
        made = self.extractor(samples, sampling_rate=self.rate, return_attention_mask=True, return_tensors="np")
        frames = int(made["attention_mask"][0].sum())
        return made["input_features"][0].astype(np.float32), -(-frames // self.step)


def make_speech(
    records: Iterable[tuple[Floats, str]],
    ear: Ear,
    tokenizer: Any,
    longest_target: int,
    number: int,
    pad: int,
    start: int,
    source: str,
) -> Speech:
    """At most `number` recordings, with the special tokens of the model; there is memory for so many, once.

    What is longer than the model hears at once is left out, and told: its end would be missing. A target that is too
    long is cut.

    Args:
        records: samples at the model's rate, and what is said.
        ear: the model's.
        tokenizer: of the model.
        longest_target: tokens.
        number: of recordings.
        pad: token that fills rows.
        start: token that a decoder begins with.
        source: of the records, for the message.
    """
    prompt = begun(tokenizer(text_target="")["input_ids"], start)[:-1]  # without the end of a text
    features = np.empty((number, *ear.shape), np.float32)
    lengths: list[int] = []
    targets: list[list[int]] = []
    too_long = 0
    for samples, text in records:
        if len(samples) > ear.longest:
            too_long += 1
            continue
        features[len(targets)], length = ear.spectrum(samples)
        lengths.append(length)
        tokens = tokenizer(text_target=text, max_length=longest_target, truncation=True, verbose=False)["input_ids"]
        targets.append(begun(tokens, start))
        if len(targets) == number:
            break
    if too_long:
        log.warning(
            "%d recordings of %s are longer than the %g s that the model hears at once, and left out: cut them",
            too_long, source, ear.longest / ear.rate,
        )  # fmt: skip
    said = padded(targets, max(map(len, targets), default=1), pad)
    positions = np.array([ear.positions], np.int32)
    return Speech(features[: len(targets)], np.array(lengths, np.int32), *said, np.array(prompt, np.int32), positions)


def begun(tokens: list[int], start: int) -> list[int]:
    """With the token that a decoder begins with in front; Whisper's tokenizer puts it there itself."""
    return tokens if tokens[:1] == [start] else [start, *tokens]
