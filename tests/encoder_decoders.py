"""Small models of an encoder and a decoder, of four families."""

from pathlib import Path
from typing import Any

import torch
import transformers
from conftest import make_tokenizer

from mpruner_dist.models.stacks import run_blocks

ENCODER, DECODER = 5, 4
IDLE = [2, 7]  # the third block of the encoder, and the third of the decoder
T5 = transformers.T5Config(
    vocab_size=128, d_model=32, d_kv=8, d_ff=64, num_layers=ENCODER, num_decoder_layers=DECODER, num_heads=4,
    decoder_start_token_id=0, pad_token_id=0, eos_token_id=2, dropout_rate=0.0, tie_word_embeddings=False,
)  # fmt: skip
BART_SIZES: dict[str, Any] = {
    "vocab_size": 128, "d_model": 32, "encoder_layers": ENCODER, "decoder_layers": DECODER, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64,
    "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1, "decoder_start_token_id": 2, "dropout": 0.0,
    "forced_eos_token_id": None,
}  # fmt: skip
FAMILIES = {
    "t5": T5,
    "bart": transformers.BartConfig(**BART_SIZES),
    "marian": transformers.MarianConfig(**BART_SIZES),
    "pegasus": transformers.PegasusConfig(**BART_SIZES),
}


def make(config: Any, folder: Path, idle: list[int] = IDLE) -> Any:
    """A model whose blocks differ visibly, but for those that do almost nothing, saved with a tokenizer."""
    torch.manual_seed(0)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config).eval()
    blocks = run_blocks(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
        for layer in idle:
            for name, parameter in blocks[layer].named_parameters():
                if name.endswith(("wo.weight", ".o.weight")):
                    parameter.mul_(1e-3)
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()  # positions that are computed, anew
