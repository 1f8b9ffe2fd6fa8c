"""Serving engines that do not read which kind a layer is, but know it by the layer's number.

A pruned checkpoint is right in transformers, which reads the lists of config.json, and would silently be wrong in such
an engine unless the kinds still follow the engine's pattern.
"""

from dataclasses import dataclass
from typing import Any

ENGINES = ("vLLM", "TensorRT-LLM", "llama.cpp")


@dataclass(frozen=True)
class Pattern:
    """Every `period`-th layer is of the full kind (full attention, or attention without positions), others are not."""

    engine: str
    families: tuple[str, ...]
    field: str
    period: int
    source: str

    def full(self, depth: int) -> list[bool]:
        """Of each layer, whether the engine takes it for a full one."""
        return [layer % self.period == self.period - 1 for layer in range(depth)]


PATTERNS = (
    Pattern("vLLM", ("gpt_oss",), "layer_types", 2, "gpt_oss.py: layer_idx % 2 == 0"),
    Pattern("TensorRT-LLM", ("gpt_oss",), "layer_types", 2, "modeling_gpt_oss.py: layer_idx % 2 == 0"),
    Pattern("llama.cpp", ("gpt_oss", "gemma2"), "layer_types", 2, "set_swa_pattern(2)"),
    Pattern("llama.cpp", ("cohere2", "llama4_text", "olmo3"), "layer_types", 4, "set_swa_pattern(4)"),
    Pattern("llama.cpp", ("gemma3n_text",), "layer_types", 5, "set_swa_pattern(5)"),
    Pattern("llama.cpp", ("gemma3_text",), "layer_types", 6, "set_swa_pattern(6)"),
    Pattern("llama.cpp", ("smollm3", "llama4_text"), "no_rope_layers", 4, "n_no_rope_layer_step = 4"),
)


def layer_kinds(config: Any, field: str) -> list[bool]:
    """Of each layer of a language model, whether its configuration makes it a full one."""
    values = getattr(config.get_text_config(), field, None) or []
    return [not value if field == "no_rope_layers" else value == "full_attention" for value in values]


def patterns_of(config: Any) -> list[Pattern]:
    """The patterns that engines know of a family."""
    return [pattern for pattern in PATTERNS if config.get_text_config().model_type in pattern.families]


def portability(config: Any) -> list[str]:
    """For each engine in a sentence whether it takes every layer for what it is."""
    lines = ["transformers: reads config.json"]
    for engine in ENGINES:
        known = [pattern for pattern in patterns_of(config) if pattern.engine == engine]
        wrong = {pattern: _wrong(config, pattern) for pattern in known}
        if not known:
            lines.append(f"{engine}: no pattern by layer number is known of {config.get_text_config().model_type}")
        for pattern, layers in wrong.items():
            said = f"takes layers {layers} for another kind" if layers else "its pattern survived"
            lines.append(f"{engine}: {said} ({pattern.field}; {pattern.source})")
    return lines


def kinds_and_pattern(config: Any) -> tuple[list[Any], list[Any]] | None:
    """The kind of each layer, and the kind that engines expect at each place; None where they expect none."""
    patterns = patterns_of(config)
    have = [layer_kinds(config, pattern.field) for pattern in patterns]
    if not patterns or not all(have):
        return None
    need = [pattern.full(len(have[0])) for pattern in patterns]
    return list(zip(*have, strict=True)), list(zip(*need, strict=True))


def _wrong(config: Any, pattern: Pattern) -> list[int]:
    kinds = layer_kinds(config, pattern.field)
    return [layer for layer, pair in enumerate(zip(kinds, pattern.full(len(kinds)), strict=True)) if pair[0] != pair[1]]
