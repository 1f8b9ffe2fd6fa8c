"""What an encoder-decoder says of what it is given."""

from typing import Any

import torch
from transformers import GenerationMixin

OF_ENCODER = ("input_ids", "attention_mask", "input_features")


def continued(model: Any, inputs: dict[str, Any], prompt: int, most: int, together: bool) -> torch.Tensor:
    """The likeliest words, one after another, int64 [rows, at most `most`], padded.

    Args:
        model: with its weights whole, or divided by ZeRO stage 3.
        inputs: of its forward pass.
        prompt: so many of the `decoder_input_ids` are given.
        most: new tokens.
        together: a worker that is done goes on as long as any other is not.
    """
    with torch.no_grad():
        # that of transformers for all models: Whisper's own would find out the language, and divide recordings
        said: torch.Tensor = GenerationMixin.generate(
            model,
            **{name: value for name, value in inputs.items() if name in OF_ENCODER},
            decoder_input_ids=inputs["decoder_input_ids"][:, :prompt],
            decoder_start_token_id=int(inputs["decoder_input_ids"][0, 0]),  # else one of its own might come before
            max_new_tokens=most,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            return_dict_in_generate=False,
            min_length=0,  # no longer than the right texts must be possible
            synced_gpus=together,
        )
    return said[:, prompt:]
