"""Small real models and texts, made on the spot; and command lines that never outlive their test."""

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import hypothesis
import pytest
import torch
import transformers
import yaml
from ranks import run_workers
from round_loop import Loop, make_config

from mpruner_dist import cli

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
for variable in [name for name in os.environ if name.startswith(("RAY_", "SLURM_", "MPRUNER_", "WANDB_"))]:
    del os.environ[variable]  # they would lead tests to another cluster, or down another path
# examples run torch on machines that do other things too: how long one takes says nothing
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")
# in the background of a shell it is ignored, and in all that is started from there too
signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = Path(__file__).parent.parent
SMOL = ROOT / "build" / "demo" / "SmolLM2-135M-Instruct"
WORDS = [f"w{number}" for number in range(120)]

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 8, "vocab_size": 128, "max_position_embeddings": 128,
}  # fmt: skip


def can_unshare() -> bool:
    """Whether a test may have mounts of its own."""
    found = shutil.which("unshare") is not None
    return found and subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0


def make_model(kind: str, folder: Path, *, seed: int = 0, spread: float = 0.3, **changes: Any) -> torch.nn.Module:
    """A random model whose layers differ visibly, saved with a tokenizer."""
    sizes = SIZES | changes
    if kind == "gpt2":  # it has names of its own
        sizes = {
            "n_embd": 32,
            "n_head": 4,
            "n_layer": sizes["num_hidden_layers"],
            "vocab_size": 128,
            "n_positions": 128,
        }
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(kind, bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, spread)
    model.eval().save_pretrained(folder)
    return model


def make_idle_layers(folder: Path, layers: list[int], share: float = 1e-3) -> None:
    """A llama with a tokenizer, some of whose layers add only `share` of what they would to their input."""
    model: Any = make_model("llama", folder, seed=3)
    with torch.no_grad():
        for layer in layers:
            model.model.layers[layer].self_attn.o_proj.weight *= share
            model.model.layers[layer].mlp.down_proj.weight *= share
    model.save_pretrained(folder)
    make_tokenizer(folder)


def make_tokenizer(folder: Path) -> None:
    """A tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def make_text(path: Path, records: int = 300, seed: int = 0) -> None:
    """Records of random words of uneven length."""
    draw = random.Random(seed)
    lines = [json.dumps({"text": " ".join(draw.choices(WORDS, k=draw.randint(5, 60)))}) for _ in range(records)]
    path.write_text("\n".join(lines) + "\n")


def names(folder: Path) -> list[str]:
    """All that is in a folder, and in those in it."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture(scope="session", autouse=True)
def _cache_of_datasets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Not the user's own, where what these tests read would stay."""
    folder = tmp_path_factory.mktemp("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder))  # of processes that a test starts
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder))
        yield
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def _logger_as_before() -> Iterator[None]:
    """A command in this process takes our records from where caplog finds them."""
    logger = logging.getLogger("mpruner_dist")
    before = logger.handlers, logger.level, logger.propagate
    yield
    logger.handlers, logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sharded llama of 8 layers (`model`), and `text.jsonl`."""
    folder = tmp_path_factory.mktemp("tiny")
    model = make_model("llama", folder / "model")
    model.save_pretrained(folder / "model", max_shard_size="60KB")
    (folder / "model" / "model.safetensors").unlink()
    make_tokenizer(folder / "model")
    make_text(folder / "text.jsonl")
    return folder


@pytest.fixture
def settings(tiny: Path) -> dict[str, Any]:
    """A configuration that prunes and retrains the tiny model, as a plain dict that a test may change."""
    return settings_for(tiny)


def settings_for(tiny: Path) -> dict[str, Any]:
    """The same for a fixture that lives longer than a test."""
    text = str(tiny / "text.jsonl")
    return {
        "model": {"path": str(tiny / "model")},
        "data": {
            "block_size": 32,
            "calibration": {"path": text, "take": [0.0, 0.4]},
            "train": {"path": text, "take": [0.4, 0.7]},
            "validation": {"path": text, "take": [0.7, 0.8]},
            "test": {"path": text, "take": [0.8, 1.0]},
        },
        "collect": {"batch_size": 2, "num_batches": 7, "samples": 32, "save_every": 2},
        "plan": {"method": "partition", "keep_layers": 6},
        "retrain": {
            "steps": 6, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-3, "warmup_steps": 1,
            "save_every": 2, "eval_every": 3, "distillation": {"weight": 0.5, "temperature": 2.0},
        },
        "evaluate": {"batch_size": 3, "max_blocks": 10},
        "cluster": {"workers": 1, "device": "cpu", "cpus_per_worker": 1},
    }  # fmt: skip


def write_config(path: Path, settings: dict[str, Any]) -> Path:
    """Write a configuration file."""
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="session")
def walked(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a finished run of `settings` by one worker, to be read only, and what the command printed."""
    folder = tmp_path_factory.mktemp("one worker")  # with a space
    config, run = write_config(folder / "config.yaml", settings_for(tiny)), folder / "run"
    command = [sys.executable, "-m", "mpruner_dist", "run", config, "--run-dir", run]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=400)
    assert done.returncode == 0, done.stdout
    return run, done.stdout


@pytest.fixture(scope="session")
def finished(walked: tuple[Path, str]) -> Path:
    return walked[0]


Cli = Callable[..., tuple[int, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run a command in this process: exit code, and everything it printed."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["mpruner", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        try:
            cli.main()
        except SystemExit as done:
            code = done.code or 0
        captured = capsys.readouterr()
        return int(code), captured.out + captured.err

    return run


@pytest.fixture
def without_ray(command: Cli, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run a command in this process; its workers are ranks of `on_ranks`, which start in a tenth of the time."""
    from mpruner_dist.cluster.session import RaySession  # here, not where ranks would import it with this file

    monkeypatch.setattr(RaySession, "connect", lambda _: None)
    monkeypatch.setattr(RaySession, "run_workers", run_workers)
    monkeypatch.setattr(RaySession, "run_tasks", lambda _, function, items, progress: [function(one) for one in items])
    return command


Mpruner = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Mpruner]:
    """Start `mpruner` commands; whatever still runs when the test ends is ended, with all that it started."""
    running: list[subprocess.Popen[str]] = []

    def begin(*arguments: object, **options: Any) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "mpruner_dist", *map(str, arguments)]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, **options
        )
        running.append(process)
        return process

    yield begin
    for process in running:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def mpruner(start: Mpruner) -> Callable[..., tuple[int, str]]:
    """Run an `mpruner` command to its end: exit code and everything it printed."""

    def run(*arguments: object, **options: Any) -> tuple[int, str]:
        process = start(*arguments, **options)
        output, _ = process.communicate(timeout=400)
        return process.returncode, output

    return run


@pytest.fixture
def loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Loop]:
    return lambda **options: Loop(tmp_path / "run", monkeypatch, make_config(**options))
