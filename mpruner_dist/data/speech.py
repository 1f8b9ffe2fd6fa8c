"""Recordings with what is said in each: a spectrum and a row of tokens a record."""

import io
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
from mpruner_dist.runs.json_files import read_json

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]
MULTILINGUAL = 51865
"""From so many tokens on a Whisper knows many languages; OpenAI's rule."""
WITH_LANGUAGE = 3
"""Tokens that such a model begins with, at least: the start, a language, what to do."""


TO_DO = ("<|translate|>", "<|transcribe|>")
"""Tokens where transformers looks for a language that only Whisper large-v3 has."""


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
    def prompt(self) -> int:
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
    """What a model makes of sound before its encoder, as its preprocessor_config.json or processor_config.json says.

    Raises:
        UserError: it hears otherwise than Whisper: spectra of a fixed length.
    """

    def __init__(self, folder: Path) -> None:
        config = read_json(folder / "config.json")
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
        except (OSError, TypeError, ValueError, soundfile.SoundFileError) as error:
            raise UserError(f"{where} is no recording that can be read: {error}") from error
        heard: Floats = soxr.resample(samples.mean(1), rate, self.rate) if len(samples) else np.zeros(0, np.float32)
        if not len(heard) or not np.isfinite(heard).all():
            raise UserError(f"{where} is {'not finite' if len(heard) else 'empty'}: take it out")
        return heard

    def spectrum(self, samples: Floats) -> tuple[Floats, int]:
        """As the model hears it, [bands, frames], and how many of the encoder's places hold sound."""
        made = self.extractor(samples, sampling_rate=self.rate, return_attention_mask=True, return_tensors="np")
        frames = int(made["attention_mask"][0].sum())
        return made["input_features"][0].astype(np.float32), -(-frames // self.step)


class Speller:
    """Makes tokens of what is said: the model's first ones, such as <|startoftranscript|><|en|>, the text, the end.

    Args:
        tokenizer: of the model.
        language: that is spoken; None leaves the tokenizer as it is set.
        longest: tokens of a target, special ones included; None takes as many as the decoder has positions for.
        config: of the model.

    Raises:
        UserError: tokenizer and model do not belong together; no language where there are many; no room for a word.
    """

    def __init__(self, tokenizer: Any, language: str | None, longest: int | None, config: Any) -> None:
        self.tokenizer, self.start, self.cut = tokenizer, config.decoder_start_token_id, 0
        knows_many = getattr(config, "vocab_size", 0) >= MULTILINGUAL
        if language is not None:
            try:
                tokenizer.set_prefix_tokens(language=language, task="transcribe")
            except (AttributeError, ValueError) as error:
                raise UserError(
                    f"data.language {language}: the model's tokenizer does not know it ({error})"
                ) from error
        alone: list[int] = tokenizer(text_target="")["input_ids"]
        self.prompt, self.end = alone[:-1], alone[-1] if alone else None
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        if self.prompt[:1] != [self.start] or self.end not in ends:
            raise UserError(
                f"the tokenizer begins a text with the tokens {self.prompt} and ends it with {self.end}, the model's "
                f"config.json has the decoder_start_token_id {self.start} and the eos_token_id {config.eos_token_id}: "
                "correct the one or the other"
            )
        if language is not None and not knows_many:
            raise UserError(f"data.language {language}: the model knows one language only; leave data.language out")
        if language is not None and tokenizer.convert_ids_to_tokens(self.prompt[1]) in TO_DO:
            raise UserError(f"data.language {language}: this model does not know it, a later Whisper does")
        if knows_many and len(self.prompt) < WITH_LANGUAGE:
            raise UserError(
                "the model knows many languages, and its tokenizer is set to none: set data.language to what is "
                "spoken, such as english"
            )
        self.longest = longest or config.max_target_positions
        if not len(self.prompt) + 1 < self.longest <= config.max_target_positions:
            raise UserError(
                f"data.target_size {self.longest}: {len(self.prompt) + 1} tokens begin and end each text, and the "
                f"decoder has positions for {config.max_target_positions}"
            )

    def spell(self, text: str) -> list[int]:
        """The tokens; those too many are cut off before the end, and counted in `cut`."""
        tokens: list[int] = self.tokenizer(text_target=text, verbose=False)["input_ids"]
        if len(tokens) > self.longest:
            self.cut += 1
            tokens = tokens[: self.longest - 1] + tokens[-1:]
        return tokens


def make_speech(
    records: Iterable[tuple[Floats, str]], ear: Ear, speller: Speller, number: int, pad: int, source: str
) -> Speech:
    """At most `number` recordings; there is memory for so many, once.

    What is longer than the model hears at once is left out, for its end would be missing; a text with too many tokens
    is cut; both are told.

    Args:
        records: samples at the model's rate, and what is said.
        ear: the model's.
        speller: the model's.
        number: of recordings.
        pad: token that fills rows.
        source: of the records, for the message.
    """
    features = np.empty((number, *ear.shape), np.float32)
    lengths: list[int] = []
    targets: list[list[int]] = []
    too_long, cut = 0, speller.cut
    for samples, text in records:
        if len(samples) > ear.longest:
            too_long += 1
            continue
        features[len(targets)], length = ear.spectrum(samples)
        lengths.append(length)
        targets.append(speller.spell(text))
        if len(targets) == number:
            break
    if too_long:
        log.warning(
            "recordings of %s that are longer than the %g s that the model hears at once, and left out: %d",
            source, ear.longest / ear.rate, too_long,
        )  # fmt: skip
    if speller.cut > cut:
        log.warning("texts of %s that are cut at %d tokens: %d", source, speller.longest, speller.cut - cut)
    said = padded(targets, max(map(len, targets), default=1), pad)
    positions, prompt = np.array([ear.positions], np.int32), np.array(speller.prompt, np.int32)
    return Speech(features[: len(targets)], np.array(lengths, np.int32), *said, prompt, positions)
