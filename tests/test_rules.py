"""Rules of the code base, read from its source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mpruner_dist"

# The higher may import the lower. Within a level, only a part itself.
LEVELS = [
    {"errors", "logs"},
    {"config", "plan"},
    {"config_file", "exchange", "options"},
    {"runs"},
    {"cluster", "checkpoints", "data"},
    {"tasks"},
    {"models"},
    {"similarity", "planning", "rewriting", "retraining", "evaluation", "reporting", "machine"},
    {"road"},
    {"steps"},
    {"rounds"},
    {"dry_run", "pipeline"},
    {"commands", "submission"},
    {"cli"},
    {"__main__", "__init__"},
]
LEVEL_OF = {part: level for level, parts in enumerate(LEVELS) for part in parts}

OWNERS = {
    "ray": {"cluster", "submission"},
    "deepspeed": {"cluster"},
    "torch.distributed": {"cluster"},
    "safetensors": {"checkpoints", "data", "similarity", "retraining"},
    "datasets": {"data"},
    "transformers": {"models", "data"},
    "huggingface_hub": {"checkpoints", "data"},
    "pydantic": {"config", "config_file", "plan"},
    "yaml": {"config", "config_file", "exchange"},
    "jiwer": {"evaluation"},
    "lm_eval": {"evaluation"},
    "rouge_score": {"evaluation"},
    "sacrebleu": {"evaluation"},
    "soundfile": {"data"},
    "soxr": {"data"},
    "typer": {"cli", "commands", "options", "submission"},
    "matplotlib": {"reporting"},
    "jinja2": {"reporting"},
    "peft": {"retraining"},
    "tensorboard": {"retraining"},
    "torch.utils.tensorboard": {"retraining"},
    "wandb": {"retraining"},
}
NO_TORCH = {
    "errors", "logs", "config", "config_file", "exchange", "plan", "runs", "checkpoints.folder", "checkpoints.header",
    "checkpoints.stored", "checkpoints.torch_files", "checkpoints.zero_files", "checkpoints.distcp",
    "checkpoints.formats", "evaluation.extras", "planning.budget", "planning.clusters",
    "planning.greedy", "planning.losses", "planning.planner", "planning.proposals", "planning.ranking",
    "planning.search", "similarity.finalise", "similarity.sums", "similarity.stage",
    "rewriting.finished", "rewriting.layout", "retraining.freezing", "retraining.settings",
    "reporting", "road", "steps", "rounds", "pipeline", "commands", "options", "submission", "cli",
    "machine.environment", "machine.hardware", "cluster.control_group", "cluster.look", "cluster.probe",
    "cluster.facts", "cluster.address",
}  # fmt: skip


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imports(source: str) -> list[str]:
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{alias.name}" if node.level == 0 else "relative" for alias in node.names]
    return found


def violations(module: str, source: str) -> list[str]:
    part = module.split(".")[0]
    found = []
    for name in imports(source):
        if name == "relative":
            found.append(f"{module}: relative import")
        elif name.startswith("mpruner_dist."):
            other = name.split(".")[1]
            if other in LEVEL_OF and other != part and LEVEL_OF[other] >= LEVEL_OF[part]:
                found.append(f"{module} imports {name}, which is not below it")
        for package, owners in OWNERS.items():
            if (name == package or name.startswith(f"{package}.")) and part not in owners:
                found.append(f"{module} imports {package}; only {sorted(owners)} may")
        if name.split(".")[0] == "torch" and (part in NO_TORCH or module in NO_TORCH):
            found.append(f"{module} imports torch")
    return found


MODULES = sorted(PACKAGE.rglob("*.py"))


def test_every_part_has_its_level() -> None:
    assert {part_of(path) for path in MODULES} == set(LEVEL_OF)


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_imports_point_down_and_packages_have_owners(path: Path) -> None:
    assert violations(module_of(path), path.read_text()) == []


def test_the_rule_can_fail() -> None:
    assert violations("planning.planner", "from mpruner_dist.rewriting import rewrite") != []
    assert violations("similarity.hsic", "import ray") != []
    assert violations("runs.folder", "from mpruner_dist.cluster.worker import Worker") != []
    assert violations("planning.planner", "import torch") != []


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_files_and_functions_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 300
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, node.name


def loaded_after(statement: str) -> set[str]:
    code = f"{statement}; import sys; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())


def test_the_command_line_imports_nothing_heavy() -> None:
    heavy = {"torch", "ray", "transformers", "deepspeed", "datasets"}
    assert heavy & loaded_after("import torch") == {"torch"}  # the check can fail
    assert not heavy & loaded_after("import mpruner_dist.cli")
    assert not heavy & loaded_after("import mpruner_dist.pipeline")
    assert not heavy & loaded_after("import mpruner_dist.planning.planner, mpruner_dist.similarity.sums")


def test_public_names() -> None:
    import mpruner_dist

    for name in mpruner_dist.__all__:
        assert callable(getattr(mpruner_dist, name))
    with pytest.raises(AttributeError, match="no attribute"):
        mpruner_dist.nothing  # noqa: B018


def test_commands_are_the_documented_ones() -> None:
    from mpruner_dist.cli import app

    names = {command.callback.__name__ for command in app.registered_commands if command.callback}
    assert names == {
        "run",
        "collect",
        "plan",
        "retrain",
        "evaluate",
        "report",
        "rewrite",
        "verify",
        "status",
        "env",
        "doctor",
    }
    assert [group.name for group in app.registered_groups] == ["submit"]


def test_nothing_names_a_registry_or_a_home() -> None:
    launch = [path for path in ROOT.glob("launch/**/*") if path.suffix in (".py", ".sh", ".yaml", ".txt")]
    for path in [*MODULES, *launch, *ROOT.glob("configs/**/*.*"), ROOT / "README.md"]:
        text = path.read_text()
        for word in ("pypi" + ".org", "/ro" + "ot/", "registry" + ".npmjs"):
            assert word not in text, path


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.name)
def test_every_configuration_is_valid(path: Path) -> None:
    from mpruner_dist.config_file import load_config

    assert yaml.safe_load(load_config(path, []).to_yaml())["model"]["path"]
