"""The demo's text: `pydoc_data.topics`, which every CPython carries, cut into samples without its repetitions.

It has 300 to 460 thousand characters, depending on the version of Python.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path

CHUNK_CHARACTERS = 3000
SHORTEST_CHUNK = 200
SHUFFLE_SEED = 0


def unique_paragraphs(topics: Mapping[str, str]) -> dict[str, list[str]]:
    """Split every topic at blank lines and drop each paragraph that was seen before.

    The topics contain each other (`compound` contains `try`, `specialnames` contains `customization`): a page
    would be both calibration and held-out data. Topics are taken in the order of their names; paragraphs that
    differ in white space only are the same.
    """
    seen: set[str] = set()
    result: dict[str, list[str]] = {}
    for topic in sorted(topics):
        result[topic] = []
        for paragraph in split_paragraphs(topics[topic]):
            key = " ".join(paragraph.split())
            if key not in seen:
                seen.add(key)
                result[topic].append(paragraph)
    return result


def split_paragraphs(text: str) -> Iterator[str]:
    """Yield the runs of lines between blank lines; indentation stays, trailing white space goes."""
    lines: list[str] = []
    for line in [*text.splitlines(), ""]:
        if line.strip():
            lines.append(line.rstrip())
        elif lines:
            yield "\n".join(lines)
            lines = []


def pack(paragraphs: list[str], size: int) -> Iterator[str]:
    """Join paragraphs to texts of at most `size` characters; a longer paragraph is a text of its own."""
    packed = ""
    for paragraph in paragraphs:
        if packed and len(packed) + 2 + len(paragraph) > size:
            yield packed
            packed = ""
        packed = f"{packed}\n\n{paragraph}" if packed else paragraph
    if packed:
        yield packed


def cut_chunks(paragraphs: Mapping[str, list[str]], size: int = CHUNK_CHARACTERS) -> list[tuple[str, str]]:
    """Turn {topic: paragraphs} into (topic, text) chunks of about `size` characters.

    A chunk shorter than `SHORTEST_CHUNK` is joined to the one before it, even across topics: a heading alone
    is no sample, and no text is lost.
    """
    chunks: list[tuple[str, str]] = []
    for topic, its_paragraphs in paragraphs.items():
        for text in pack(its_paragraphs, size):
            if len(text) < SHORTEST_CHUNK and chunks:
                before, longer = chunks.pop()
                chunks.append((before, f"{longer}\n\n{text}"))
            else:
                chunks.append((topic, text))
    return chunks


def write_topics(target: Path) -> None:
    """Write `pydoc_data.topics` as JSON lines, in an order that is random but always the same."""
    from pydoc_data.topics import topics

    chunks = cut_chunks(unique_paragraphs(topics))
    random.Random(SHUFFLE_SEED).shuffle(chunks)
    partial = target.with_name(f"{target.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"topic": topic, "text": text}) + "\n" for topic, text in chunks)
    partial.replace(target)
    before, after = sum(map(len, topics.values())), sum(len(text) for _, text in chunks)
    print(f"{target}: {len(chunks)} texts, {after:,} characters ({before:,} with repetitions)")
