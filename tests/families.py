"""A tiny model of every family that rewriting is tested on."""

from pathlib import Path
from typing import Any

import torch
import transformers

LLAMA: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 8, "vocab_size": 128, "max_position_embeddings": 128,
}  # fmt: skip
SEQ2SEQ: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 5, "decoder_layers": 5, "encoder_attention_heads": 4, "vocab_size": 128,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "decoder_start_token_id": 1,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "forced_eos_token_id": None, "max_length": 30,
}  # fmt: skip
MIXTURE: dict[str, Any] = LLAMA | {"head_dim": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DEEPSEEK: dict[str, Any] = MIXTURE | {
    "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "kv_lora_rank": 16,
    "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 3,
}  # fmt: skip
VISION: dict[str, Any] = {"image_size": 28, "patch_size": 14} | {
    name: LLAMA[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
}
GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 8, "vocab_size": 128, "n_positions": 128}
BLOOM = {"hidden_size": 32, "n_head": 4, "n_layer": 8, "vocab_size": 128}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 5, "num_decoder_layers": 4, "num_heads": 4, "vocab_size": 128}
STAGES: dict[str, Any] = {"hidden_sizes": [8, 16, 32, 32], "depths": [2, 3, 4, 2]}
WINDOW = {"head_dim": 8, "sliding_window": 4}

DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", LLAMA | {"tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", LLAMA | {"sliding_window": 8}),
    "qwen2": ("Qwen2ForCausalLM", LLAMA | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 5}),
    "qwen3": ("Qwen3ForCausalLM", LLAMA | {"head_dim": 8}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        MIXTURE | {"num_experts": 4, "shared_expert_intermediate_size": 16, "decoder_sparse_step": 2},
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", MIXTURE | {"num_experts": 4, "mlp_only_layers": [0, 3]}),
    "mixtral": ("MixtralForCausalLM", LLAMA | {"num_local_experts": 4}),
    "gemma2": ("Gemma2ForCausalLM", LLAMA | WINDOW),
    "gemma3_text": ("Gemma3ForCausalLM", LLAMA | WINDOW),
    "gpt_oss": ("GptOssForCausalLM", LLAMA | WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "phi3": ("Phi3ForCausalLM", LLAMA),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt_neox": ("GPTNeoXForCausalLM", LLAMA),
    "opt": ("OPTForCausalLM", LLAMA | {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "bloom": ("BloomForCausalLM", BLOOM),
    "falcon": ("FalconForCausalLM", {n: v for n, v in LLAMA.items() if n != "intermediate_size"}),
    "olmo2": ("Olmo2ForCausalLM", LLAMA),
    "deepseek_v3": ("DeepseekV3ForCausalLM", DEEPSEEK),
    "glm4_moe": (
        "Glm4MoeForCausalLM",
        MIXTURE | {"n_routed_experts": 4, "first_k_dense_replace": 2, "n_group": 1, "topk_group": 1},
    ),
    "llama4_text": (
        "Llama4ForCausalLM",
        LLAMA | {"head_dim": 8, "num_local_experts": 4, "intermediate_size_mlp": 64, "interleave_moe_layer_step": 2,
                 "attention_chunk_size": 8},
    ),
    "smollm3": ("SmolLM3ForCausalLM", LLAMA),
    "cohere2": ("Cohere2ForCausalLM", LLAMA | {"sliding_window": 4}),
    "granite": ("GraniteForCausalLM", LLAMA),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        {"hidden_size": 32, "num_layers": 8, "num_heads": 4, "attention_types": [[["global", "local"], 4]],
         "window_size": 4, "vocab_size": 128, "max_position_embeddings": 128, "intermediate_size": 64},
    ),
}  # fmt: skip
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        {"text_config": LLAMA | WINDOW, "vision_config": VISION, "mm_tokens_per_image": 4, "image_token_index": 127},
    ),
    "bert": ("BertForMaskedLM", LLAMA),
    "roberta": ("RobertaForMaskedLM", LLAMA),
    "distilbert": (
        "DistilBertForMaskedLM", {"dim": 32, "hidden_dim": 64, "n_heads": 4, "n_layers": 8, "vocab_size": 128}
    ),
    "vit": ("ViTForImageClassification", VISION),
    "dinov2": ("Dinov2ForImageClassification", VISION),
    "whisper": (
        "WhisperForConditionalGeneration",
        SEQ2SEQ | {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 40, "suppress_tokens": None,
                   "begin_suppress_tokens": None},
    ),
    "bart": ("BartForConditionalGeneration", SEQ2SEQ | {"max_position_embeddings": 64}),
    "t5": ("T5ForConditionalGeneration", T5 | {"decoder_start_token_id": 0}),
    "t5gemma": (
        "T5GemmaForConditionalGeneration",
        {"encoder": LLAMA | WINDOW, "decoder": LLAMA | WINDOW | {"num_hidden_layers": 6}, "vocab_size": 128},
    ),
    "switch_transformers": (
        "SwitchTransformersForConditionalGeneration",
        {n: v for n, v in T5.items() if n != "num_decoder_layers"} | {
            "num_layers": 8, "num_decoder_layers": 6, "num_experts": 2, "expert_capacity": 64,
            "num_sparse_encoder_layers": 4, "num_sparse_decoder_layers": 3, "decoder_start_token_id": 0},
    ),
    "deberta-v2": ("DebertaV2ForMaskedLM", LLAMA | {"conv_kernel_size": 3}),
    "longformer": ("LongformerForMaskedLM", LLAMA | {"attention_window": [4] * 8}),
    "prophetnet": (
        "ProphetNetForConditionalGeneration",
        {"hidden_size": 32, "num_encoder_layers": 5, "num_decoder_layers": 4, "num_encoder_attention_heads": 4,
         "num_decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 128},
    ),
    "resnet": ("ResNetForImageClassification", STAGES | {"embedding_size": 8, "layer_type": "basic"}),
    "convnext": ("ConvNextForImageClassification", STAGES),
    "swin": (
        "SwinForImageClassification",
        {"image_size": 64, "patch_size": 2, "embed_dim": 8, "depths": [2, 2, 6, 2], "num_heads": [1, 2, 2, 2],
         "window_size": 4},
    ),
    "jamba": (
        "JambaForCausalLM", LLAMA | {"num_hidden_layers": 16, "num_experts": 2, "mamba_d_state": 4, "mamba_dt_rank": 4}
    ),
    "minimax": (
        "MiniMaxForCausalLM", LLAMA | {"head_dim": 8, "num_local_experts": 2, "layer_types": ["linear_attention"] * 8}
    ),
    "gemma3n_text": (
        "Gemma3nForCausalLM",
        LLAMA | {"num_hidden_layers": 10, "num_kv_shared_layers": 2, "head_dim": 8, "vocab_size_per_layer_input": 128,
                 "hidden_size_per_layer_input": 8, "laurel_rank": 4, "altup_num_inputs": 2},
    ),
}  # fmt: skip
FAMILIES = DECODERS | OTHERS


def make_family(kind: str, folder: Path, *, seed: int = 0, spread: float = 0.3, **changes: Any) -> Any:
    """A random model whose layers differ visibly, saved as transformers saves it."""
    architecture, settings = FAMILIES[kind]
    torch.manual_seed(seed)
    tokens = {} if "vocab_size" not in settings else {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(kind, **(tokens | settings | changes))
    model = getattr(transformers, architecture)._from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or "scale" in name or "lambda" in name or "gamma" in name:
                parameter.normal_(0, spread)
    model.eval().save_pretrained(folder)
    return model


def inputs_of(model: Any) -> dict[str, torch.Tensor]:
    """What the model's forward takes."""
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 120, (2, 20), generator=draw)
    config = model.config
    if config.model_type == "whisper":
        return {"input_features": torch.randn(2, 8, 40, generator=draw), "decoder_input_ids": ids}
    if config.model_type == "gemma3":
        ids[:, 2:6] = config.image_token_id
        pixels = torch.randn(2, 3, 28, 28, generator=draw)
        return {"input_ids": ids, "pixel_values": pixels, "token_type_ids": (ids == config.image_token_id).int()}
    if config.is_encoder_decoder:
        return {"input_ids": ids, "decoder_input_ids": ids[:, :9].flip(0)}
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, *[getattr(config, "image_size", 64)] * 2, generator=draw)}
    return {"input_ids": ids}
