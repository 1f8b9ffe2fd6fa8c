"""The plan: which layers stay, which go, and why. What planning makes and rewriting carries out; pure data.

Layer ranges are written as people write them: `0-11,20-31`, inclusive, counted from 0.
"""

import json
import re
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from mpruner_dist.errors import UserError


class Plan(BaseModel):
    """Content of `plan.json`. `kept` and `num_layers` suffice in a plan written by hand."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_layers: int
    kept: list[int]
    dropped: list[int] = []
    clusters: list[list[int]] = []
    reasons: dict[str, Any] = {}
    method: str = "given"
    judged: dict[str, Any] | None = None
    """Of a plan that was judged by its loss on text: the passes that took, the tokens, the loss without and with it."""

    @model_validator(mode="after")
    def _layers_exist(self) -> Self:
        if not self.kept:
            raise ValueError("kept is empty: a model needs at least one layer")
        strange = [layer for layer in self.kept if not 0 <= layer < self.num_layers]
        if strange:
            raise ValueError(f"kept names layer {strange[0]}; the model has layers 0 to {self.num_layers - 1}")
        if sorted(set(self.kept)) != self.kept:
            raise ValueError("kept must name each layer once, in ascending order")
        rest = [layer for layer in range(self.num_layers) if layer not in self.kept]
        if self.dropped and self.dropped != rest:
            raise ValueError(f"dropped is {self.dropped}, but what kept leaves out is {rest}")
        return self

    @classmethod
    def keeping(cls, num_layers: int, kept: list[int], **more: Any) -> Self:
        """A plan from what is kept.

        Raises:
            UserError: it keeps nothing or names a layer that is not there.
        """
        dropped = [layer for layer in range(num_layers) if layer not in kept]
        plan: Self = _validated(cls, {"num_layers": num_layers, "kept": kept, "dropped": dropped} | more, "the plan")
        return plan


def _validated(cls: Any, content: Any, where: str) -> Any:
    try:
        return cls.model_validate(content)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, p['loc']))} {p['msg'].removeprefix('Value error, ')}".strip() for p in error.errors()
        )
        raise UserError(f"{where}: {problems}") from error


Keep = list[int] | dict[str, list[int]] | Plan
"""Layers that stay: of a model's only stack or its language model's; of several stacks by name; or by a plan.

A plan counts the layers of an encoder and its decoder, or of all stages of a vision model, one after another."""


def read_plan(path: Path, num_layers: int | None = None) -> Plan:
    """Read a plan for a model of `num_layers` layers; for one of any depth if that is None.

    Raises:
        UserError: unreadable, not a plan, or for another number of layers.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the plan {path}: {error}") from error
    plan: Plan = _validated(Plan, content, f"the plan {path}")
    if num_layers not in (None, plan.num_layers):
        raise UserError(f"the plan {path} is for {plan.num_layers} layers, the model has {num_layers}")
    return Plan.keeping(
        plan.num_layers, plan.kept, **plan.model_dump(include={"clusters", "reasons", "method", "judged"})
    )


def parse_layers(text: str) -> list[int]:
    """Layers of a text such as `0-11,20-31`, in ascending order.

    Raises:
        UserError: not such a text, a range that runs backwards, or a layer named twice.
    """
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", part.strip())
        if match is None:
            raise UserError(f"layers {text!r}: write ranges such as 0-11,20-31, counted from 0, ends included")
        begin, end = int(match[1]), int(match[2] or match[1])
        if end < begin:
            raise UserError(f"layers {text!r}: the range {part.strip()} runs backwards")
        layers += range(begin, end + 1)
    if len(set(layers)) != len(layers):
        raise UserError(f"layers {text!r}: a layer is named twice")
    return sorted(layers)


def parse_keep(texts: list[str]) -> Keep:
    """Layers of one text such as `0-11`, or of several such as `encoder=0-5`.

    Raises:
        UserError: several texts without names, or a name twice.
    """
    if len(texts) == 1 and "=" not in texts[0]:
        return parse_layers(texts[0])
    named: dict[str, list[int]] = {}
    for text in texts:
        name, equals, layers = text.partition("=")
        if not equals or not name or name in named:
            raise UserError(f"--keep {text}: with several stacks write each once, by name, such as decoder=0-5")
        named[name] = parse_layers(layers)
    return named


def format_layers(layers: list[int]) -> str:
    """The shortest such text for ascending layers."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and parts[-1][-1] == layer - 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ",".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def by_stack(layers: list[int], depths: Iterable[int]) -> list[list[int]]:
    """Layers that are counted through several stacks, as each of these counts its own; given how many each has."""
    found, first = [], 0
    for depth in depths:
        found.append([layer - first for layer in layers if first <= layer < first + depth])
        first += depth
    return found


def nearest_matching(have: Sequence[Hashable], need: Sequence[Hashable], wanted: list[int]) -> list[int] | None:
    """Layers, ascending, whose kinds are `need` one after another, with as many of `wanted` among them as possible.

    Args:
        have: kind of each layer.
        need: kind asked for at each new place.
        wanted: layers that one would rather keep.

    Returns:
        One layer for each entry of `need`; None where no choice fits.
    """
    liked = set(wanted)
    # best[i]: for the first places, the most liked layers with the last of them at layer i, and which they are
    best: dict[int, tuple[int, tuple[int, ...]]] = {-1: (0, ())}
    for kind in need:
        further: dict[int, tuple[int, tuple[int, ...]]] = {}
        so_far: tuple[int, tuple[int, ...]] = (-1, ())
        for layer in range(-1, len(have)):
            if so_far[0] >= 0 and layer >= 0 and have[layer] == kind:
                further[layer] = (so_far[0] + (layer in liked), (*so_far[1], layer))
            if layer in best and best[layer][0] > so_far[0]:
                so_far = best[layer]
        best = further
    return list(max(best.values())[1]) if best else None
