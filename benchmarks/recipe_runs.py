"""The runs of benchmarks/recipes.py: a recipe with each seed, and its baselines at equal depth and training."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipe_tables import ORIGINAL, RECIPE, Found, Outcome

from mpruner_dist.checkpoints.folder import CheckpointFolder, read_checkpoint
from mpruner_dist.checkpoints.naming import layer_parameters
from mpruner_dist.checkpoints.source import resolve_source
from mpruner_dist.config import Config
from mpruner_dist.config_file import load_config
from mpruner_dist.errors import Fruitless, UserError
from mpruner_dist.pipeline import run
from mpruner_dist.plan import Plan, read_plan
from mpruner_dist.runs.commit import write_json
from mpruner_dist.runs.folder import read_manifest

BASELINES = ("influence", "last", "random", ORIGINAL)


@dataclass(frozen=True)
class Measured:
    """What all runs came to."""

    found: Found
    steps: dict[int, int] = field(default_factory=dict)
    """By seed: how many steps the baselines were retrained for."""
    notes: list[str] = field(default_factory=list)
    """What a reader must know of single runs."""


def configuration(file: Path, seed: int, *overrides: str) -> Config:
    """The file's, with a seed for everything that is drawn."""
    seeds = (f"{section}.seed={seed}" for section in ("collect", "plan", "retrain"))
    return load_config(file, [*seeds, *overrides])


def baseline_configuration(file: Path, folder: Path, seed: int, name: str, plan: Plan, steps: int) -> Config:
    """One shot at the depth of the recipe's plan, and training of so many steps."""
    overrides = [
        "rounds=null", f"retrain.steps={steps}", "collect.until=all", "plan.target_parameters=null", "plan.stride=1",
        "plan.keep=first",
    ]  # fmt: skip
    if name == ORIGINAL:
        everything = (folder / "original.json").absolute()
        write_json(everything, Plan.keeping(plan.num_layers, list(range(plan.num_layers))).model_dump())
        # nothing is removed: no pattern to preserve, and no layer beside a gap to train alone
        overrides += [
            "plan.method=file", f"plan.file={everything}", "plan.keep_layers=null", "plan.preserve_pattern=false",
            "retrain.trainable=all",
        ]  # fmt: skip
    else:
        overrides += [f"plan.method={name}", "plan.file=null", f"plan.keep_layers={len(plan.kept)}"]
    return configuration(file, seed, *overrides)


def measure(file: Path, folder: Path, seeds: list[int], baselines: list[str]) -> Measured:
    """Run what is not done yet, seed by seed.

    Raises:
        UserError: the recipe retrains nothing.
    """
    if load_config(file, []).retrain is None:
        raise UserError(f"{file} has no section retrain: models that are only pruned are compared by mpruner plan")
    measured = Measured({variant: {} for variant in (RECIPE, *baselines)})
    for seed in seeds:
        config = configuration(file, seed)
        recipe = run(config, folder / f"{RECIPE}-seed{seed}")
        measured.found[RECIPE][seed] = outcome(recipe, config)
        if read_plan(recipe / "plan.json").dropped:
            run_baselines(measured, file, folder, seed, recipe)
        else:
            measured.notes.append(f"seed {seed}: no round was accepted, the recipe's result is the original itself")
    return measured


def run_baselines(measured: Measured, file: Path, folder: Path, seed: int, recipe: Path) -> None:
    """Run the baselines of a seed; where a plan is that of another variant, take that one's result."""
    asked, plan = load_config(file, []), read_plan(recipe / "plan.json")
    accepted = accepted_rounds(recipe) if asked.rounds is not None else 1
    measured.steps[seed] = asked.retrain.steps * accepted if asked.retrain else 0
    collected = recipe if asked.rounds is None else recipe / "round-01"
    # what is trained in several rounds is not what one shot of the same plan comes to
    trained = {tuple(plan.kept): recipe} if accepted == 1 else {}
    for name in [variant for variant in measured.found if variant != RECIPE]:
        config = baseline_configuration(file, folder, seed, name, plan, measured.steps[seed])
        where = folder / f"{name}-seed{seed}"
        taken = collected if asked.collect.until == "all" else None  # else they were made from fewer batches
        run(config, where, last="plan", collected=taken)
        kept = tuple(read_plan(where / "plan.json").kept)
        if same := trained.get(kept):
            link(where / "evaluation.json", same)
            measured.notes.append(f"seed {seed}: {name} has the plan, and the result, of {same.name}")
        else:
            try:
                run(config, where, collected=taken)
            except Fruitless as error:
                measured.notes.append(f"seed {seed}: {name} came to nothing and is left out: {error}")
                continue
            trained[kept] = where
        measured.found[name][seed] = outcome(where, config, is_own=same is None)


def link(file: Path, other: Path) -> None:
    """Let a file be that of the same name in a folder beside this one's."""
    file.unlink(missing_ok=True)
    file.symlink_to(Path("..", other.name, file.name))


def accepted_rounds(folder: Path) -> int:
    """How many rounds of a run were accepted."""
    rounds: dict[str, Any] = json.loads((folder / "rounds.json").read_text())
    return sum(entry["accepted"] for entry in rounds["rounds"])


def outcome(folder: Path, config: Config, is_own: bool = True) -> Outcome:
    """What a run folder holds; `is_own` is false where its result is another's."""
    layers = json.loads((folder / "cka.json").read_text())["layers"]
    sizes = layer_parameters(original(config), layers)
    kept = read_plan(folder / "plan.json", len(sizes)).kept
    return Outcome(
        json.loads((folder / "evaluation.json").read_text()),
        (sum(sizes), sum(sizes[layer] for layer in kept)),
        seconds_of(folder) if is_own else None,
    )


def original(config: Config) -> CheckpointFolder:
    """The model that is pruned."""
    return read_checkpoint(resolve_source(config.model.path, config.model.revision))


def seconds_of(folder: Path) -> float:
    """Of all stages, those of rounds included."""
    folders = (folder, *folder.glob("round-*"))
    return sum(float(stage.get("seconds", 0.0)) for part in folders for stage in read_manifest(part).values())


def caption(file: Path, asked: Config, measured: Measured) -> str:
    """How the numbers of the first table came about."""
    recipe = measured.found[RECIPE]
    text = (
        f"{file}, plan.method {asked.plan.method}{' in rounds' if asked.rounds else ''}, seeds "
        f"{', '.join(map(str, recipe))}: mean ± standard deviation over the seeds, before → after, and quality of the "
        "original → pruned → retrained model, on the test part. Each baseline keeps as many layers as the recipe's "
        f"plan of the same seed; {ORIGINAL} keeps all. "
    )
    if asked.rounds is None:
        text += "All are retrained alike. "
    else:
        steps = ", ".join(f"{count} (seed {seed})" for seed, count in measured.steps.items()) or "none"
        text += (
            "Baselines are pruned at once and retrained for as many steps as the recipe's accepted rounds together, so "
            f"on as many training samples; steps: {steps}. The recipe's pruned model is that of its last accepted "
            "round, which stands on what the rounds before retrained. "
        )
    if asked.retrain and asked.retrain.trainable != "all" and ORIGINAL in measured.found:
        text += f"{ORIGINAL} has no gaps beside which to train: all of it is. "
    if any("gpu_bytes" not in outcome.of("original") for outcome in recipe.values()):
        text += (
            "Bytes are those of the weights; the peak of memory is not measured on CPUs, where it cannot be set back "
            "between two models. "
        )
    return text + (
        "Speed is the retrained model's in evaluation as a multiple of the original's. Seconds are those of all "
        "stages, of a baseline without the similarities that it took over from the recipe's run."
    )
