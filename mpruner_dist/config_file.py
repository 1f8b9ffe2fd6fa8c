"""The YAML file of a run. Mistakes come back all at once, each with the nearest valid name."""

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from mpruner_dist.config import Config
from mpruner_dist.errors import UserError

MERGE = "tag:yaml.org,2002:merge"
"""Of the key `<<`, whose table gives way to what stands beside it."""


class _UniqueKeys(yaml.SafeLoader):
    """YAML as it is, but a key given twice is a mistake: otherwise the first of them would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        own = [key for key, _ in node.value if key.tag != MERGE]
        keys = [self.construct_object(key, deep=True) for key in own]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def load_config(path: Path, overrides: list[str]) -> Config:
    """Read a YAML file and apply `a.b=c` overrides, the value read as YAML.

    Raises:
        UserError: the file cannot be read, or with every mistake in it.
    """
    try:
        content = yaml.load(path.read_text(), Loader=_UniqueKeys)
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, ValueError) as error:  # also of what is no text, or no date such as 2024-02-30
        raise UserError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold sections such as `model:` and `data:`, it holds {type(content).__name__}")
    for override in overrides:
        _apply(content, override)
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        lines = [f"  {_describe(problem)}" for problem in error.errors()]
        raise UserError(f"{path}: {len(lines)} mistake(s)\n" + "\n".join(lines)) from error


def _apply(content: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"--set {override!r}: write section.key=value, such as plan.threshold=0.97")
    *sections, last = key.split(".")
    for section in sections:
        if content.get(section) is None:
            content[section] = {}
        content = content[section]
        if not isinstance(content, dict):
            raise UserError(f"--set {override!r}: {section} is a value, not a section")
    try:
        content[last] = yaml.load(value, Loader=_UniqueKeys)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"--set {override!r}: the value is not YAML: {error}") from error


def _describe(problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"]) or "configuration"
    if problem["type"] == "extra_forbidden":
        names = _field_names(problem["loc"][:-1])
        near = difflib.get_close_matches(str(problem["loc"][-1]), names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"valid names: {', '.join(sorted(names))}"
        return f"{where}: unknown key; {hint}"
    if problem["type"] == "missing":
        return f"{where}: must be given"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error" or isinstance(problem["input"], dict):
        return f"{where}: {message}"
    return f"{where}: {message}, got {problem['input']!r}"


def _field_names(location: tuple[Any, ...]) -> list[str]:
    model: type[BaseModel] = Config
    for part in location:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), model)
    return list(model.model_fields)
