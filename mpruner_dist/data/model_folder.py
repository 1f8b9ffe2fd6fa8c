"""What lies in a model's folder beside its weights: configuration and tokenizer, as transformers reads them."""

from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError

from mpruner_dist.errors import UserError

CONFIG_ERRORS = (
    OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, ZeroDivisionError, AssertionError,
    NotImplementedError, StrictDataclassError,
)  # fmt: skip
"""What the classes of transformers raise over a configuration that makes no sense."""


def read_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """The model's configuration, as its own class completes it.

    Raises:
        UserError: transformers cannot read it.
    """
    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except CONFIG_ERRORS as error:
        raise UserError(f"transformers {transformers.__version__} cannot read {folder}/config.json: {error}") from error


def load_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    """The tokenizer that lies in a model's folder.

    Raises:
        UserError: there is none that transformers can load, or it cannot read the configuration.
    """
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (*CONFIG_ERRORS, ImportError) as error:
        read_config(folder, trust_remote_code)  # of which the tokenizer's class is read, and which may be what is wrong
        raise UserError(f"{folder} holds no tokenizer that transformers can load: {error}") from error
