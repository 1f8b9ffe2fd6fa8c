"""Each stage of one run: what it is made from, what it makes, and how.

What a stage needs is imported where it is run: a run that only plans anew imports no torch.
"""

import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from mpruner_dist.checkpoints.folder import read_checkpoint
from mpruner_dist.checkpoints.naming import layer_parameters
from mpruner_dist.checkpoints.source import resolve_source
from mpruner_dist.cluster.settings import read_deepspeed_config
from mpruner_dist.config import Config, SourceConfig
from mpruner_dist.errors import UserError
from mpruner_dist.logs import show_progress
from mpruner_dist.plan import Plan, format_layers, read_plan
from mpruner_dist.planning.clusters import open_decisions
from mpruner_dist.runs.commit import write_json
from mpruner_dist.runs.digest import digest, file_digest, spot_digest
from mpruner_dist.runs.folder import Inputs, RunFolder

if TYPE_CHECKING:
    from mpruner_dist.cluster.session import RaySession

log = logging.getLogger(__name__)

Step = tuple[Inputs, tuple[str, ...], Callable[[], None]]


class Road:
    """The stages, each a method that returns its inputs, its outputs and the function that makes them.

    Unfinished work lies in folders named by the digest of its inputs, so that it is never taken for another's.
    """

    def __init__(self, config: Config, folder: RunFolder) -> None:
        self.config, self.folder = config, folder
        self.source = resolve_source(config.model.path, config.model.revision)
        self.checkpoint = read_checkpoint(self.source)
        self.model_id = self.checkpoint.fingerprint()
        self._session: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._session is not None:
            self._session.__exit__(*error)

    def step(self, name: str) -> Step:
        """The stage of this name."""
        step: Step = getattr(self, name)()
        return step

    @property
    def session(self) -> "RaySession":
        """Ray, connected at first use."""
        if self._session is None:
            from mpruner_dist.cluster.session import RaySession

            self._session = RaySession(self.config.cluster)
        return self._session  # type: ignore[no-any-return]

    def data(self) -> Step:
        """Text to token blocks."""
        from mpruner_dist.data.needed import blocks_needed

        tokenizer = {file.name: spot_digest(file) for file in sorted(self.source.glob("*token*"))}
        files = {part: source_digest(source) for part, source in self.config.data.parts().items()}
        inputs = {
            "tokenizer": tokenizer,
            "data": self.config.data.model_dump(mode="json"),
            "blocks": blocks_needed(self.config),
            "files": files,
        }

        def make() -> None:
            from mpruner_dist.data.prepare import prepare_data

            progress = self.folder / "logs/progress.json"
            with show_progress(progress):
                prepare_data(self.config, self.source, self.folder / "data", progress)

        return inputs, ("data/data.json",), make

    def collect(self) -> Step:
        """Activations to HSIC sums to `cka.json`, on the workers."""
        inputs: Inputs = {
            "model": self.model_id,
            "dtype": self.config.model.dtype,
            "calibration": self._text("calibration"),
            "collect": self.config.collect.model_dump(exclude={"save_every"}),
        }
        decisions = None
        if self.config.collect.until == "settled":
            plan, z = self.config.plan, self.config.collect.settled_z
            decisions = partial(open_decisions, threshold=plan.threshold, standard_errors=z)
            inputs["settled"] = {"measure": plan.measure, "threshold": plan.threshold}

        def make() -> None:
            from mpruner_dist.models.blocks import num_layers
            from mpruner_dist.models.loading import read_config
            from mpruner_dist.models.naming import block_prefix
            from mpruner_dist.similarity.collect import collect_job
            from mpruner_dist.similarity.stage import is_settled, write_cka

            remote_code = self.config.model.trust_remote_code
            model_config = read_config(self.source, remote_code)
            prefix = block_prefix(self.checkpoint.tensors, model_config, remote_code)
            sums = self._work("stats", inputs)
            measure = self.config.plan.measure
            self._on_workers(
                "collect", collect_job, blocks=self._blocks("calibration"), sums=sums, model=self.source,
                is_settled=partial(is_settled, stream=measure, decisions=decisions) if decisions else None,
            )  # fmt: skip
            layers = [f"{prefix}.{layer}" for layer in range(num_layers(model_config))]
            content = write_cka(sums, layers, self.folder / "cka.json", self.config.collect, measure, decisions)
            _tell(content)

        return inputs, ("cka.json",), make

    def plan(self) -> Step:
        """`cka.json` to `plan.json`: instant, no torch."""
        given = self.config.plan.file
        inputs = {
            "cka": file_digest(self.folder / "cka.json"),
            "plan": self.config.plan.model_dump(mode="json"),
            "file": file_digest(given) if given and given.is_file() else None,
        }

        def make() -> None:
            from mpruner_dist.planning.planner import make_plan

            similarity = json.loads((self.folder / "cka.json").read_text())
            prefix = similarity["layers"][0].rpartition(".")[0]
            sizes = layer_parameters(self.checkpoint, prefix, len(similarity["layers"]))
            measured = similarity if self.config.plan.measure == "states" else similarity["updates"]
            plan = make_plan(
                measured["cka"],
                self.config.plan,
                stderr=measured["stderr"],
                parameters=sizes,
                other_parameters=self.checkpoint.num_parameters - sum(sizes),
                pattern=self._pattern() if self.config.plan.preserve_pattern else None,
            )
            write_json(self.folder / "plan.json", plan.model_dump())
            log.info("  keeps layers %s of %d", format_layers(plan.kept), plan.num_layers)

        return inputs, ("plan.json",), make

    def _pattern(self) -> Any:
        from mpruner_dist.models.loading import read_config
        from mpruner_dist.models.serving import kinds_and_pattern

        return kinds_and_pattern(read_config(self.source, self.config.model.trust_remote_code))

    def rewrite(self) -> Step:
        """The checkpoint without the layers, proven."""
        plan = self._plan()
        inputs = {"model": self.model_id, "kept": plan.kept}

        def make() -> None:
            from mpruner_dist.rewriting.rewrite import rewrite_checkpoint

            if not plan.dropped:
                raise UserError(
                    f"the plan removes nothing: {self.folder / 'plan.json'} keeps all {plan.num_layers} layers. Lower "
                    "plan.threshold, or set plan.method partition with plan.keep_layers; cka.json has the similarities"
                )
            rewrite_checkpoint(
                self.source,
                self.folder / "pruned",
                plan.kept,
                trust_remote_code=self.config.model.trust_remote_code,
                run_tasks=partial(self.session.run_tasks, progress=self.folder / "logs/progress.json"),
            )

        return inputs, ("pruned",), make

    def retrain(self) -> Step:
        """The pruned checkpoint to the retrained one, on the workers."""
        section = self.config.retrain
        if section is None:
            raise UserError("there is no retrain section in the configuration")
        inputs: Inputs = {
            "model": self.model_id,
            "kept": self._plan().kept,
            "dtype": self.config.model.dtype,
            "train": self._text("train"),
            "validation": self._text("validation"),
            "retrain": section.model_dump(exclude={"save_every", "deepspeed"}),
            "deepspeed": read_deepspeed_config(section.deepspeed),
        }

        def make() -> None:
            from mpruner_dist.retraining.job import retrain_job, write_summary

            work = self._work("retrain", inputs)
            self._on_workers(
                "retrain", retrain_job, given=inputs["deepspeed"], pruned=self.folder / "pruned", teacher=self.source,
                train=self._blocks("train"), validation=self._blocks("validation"), work=work,
                target=self.folder / "retrained",
            )  # fmt: skip
            write_summary(work / "metrics.jsonl", self.folder / "retrain.json")

        return inputs, ("retrained", "retrain.json"), make

    def evaluate(self) -> Step:
        """Quality, size and speed of each model, on the workers."""
        models = {"original": self.source, "pruned": self.folder / "pruned"}
        if self.config.retrain is not None:
            models["retrained"] = self.folder / "retrained"
        inputs = {
            "models": {label: read_checkpoint(path).fingerprint() for label, path in models.items()},
            "dtype": self.config.model.dtype,
            "test": self._text("test"),
            "evaluate": self.config.evaluate.model_dump(),
        }

        def make() -> None:
            from mpruner_dist.evaluation.job import evaluate_job, write_evaluation

            results = self._work("evaluation", inputs)
            self._on_workers("evaluate", evaluate_job, models=models, blocks=self._blocks("test"), results=results)
            write_evaluation(results, list(models), self.folder / "evaluation.json")

        return inputs, ("evaluation.json",), make

    def report(self) -> Step:
        """`report.html`, and a model card in each output folder."""
        names = ["data/data.json", "cka.json", "plan.json", "evaluation.json"]
        names += ["retrain.json"] if self.config.retrain is not None else []
        inputs: Inputs = {name: file_digest(self.folder / name) for name in names}

        def make() -> None:
            from mpruner_dist.reporting.report import write_report

            write_report(self.folder.path, self.config, self.folder.stages)

        return inputs, ("report.html",), make

    def _plan(self) -> Plan:
        depth = len(json.loads((self.folder / "cka.json").read_text())["layers"])
        return read_plan(self.folder / "plan.json", depth)

    def _blocks(self, part: str) -> Path:
        return self.folder / f"data/{part}.safetensors"

    def _text(self, part: str) -> str:
        summary = json.loads((self.folder / "data/data.json").read_text())
        return str(summary["parts"][part]["digest"])

    def _work(self, kind: str, inputs: Inputs) -> Path:
        """The folder for unfinished work from these inputs."""
        work = self.folder / kind / digest(inputs)
        work.mkdir(parents=True, exist_ok=True)
        return work

    def _on_workers(self, stage: str, job: Any, given: Inputs | None = None, **spec: Any) -> None:
        given = read_deepspeed_config(self.config.cluster.deepspeed) if given is None else given
        self.session.run_workers(job, spec | {"config": self.config, "deepspeed": given}, stage, self.folder.path)


def _tell(similarity: Inputs) -> None:
    """Say what a user should know of `cka.json` before planning by it."""
    done, asked = similarity["num_batches"], similarity["asked_batches"]
    if similarity["open"] == []:
        log.info("  settled after %d of %d batches", done, asked)
    elif similarity["open"]:
        log.warning("not settled after all %d batches: %d comparison(s) are open", asked, len(similarity["open"]))
    if similarity["dominated"]:
        log.warning(
            "few %ss dominate the similarity of %s: set collect.normalize true, or lower collect.outlier_norm",
            similarity["unit"], ", ".join(similarity["dominated"]),
        )  # fmt: skip


def source_digest(source: SourceConfig) -> dict[str, str]:
    """Digests of the files that a source reads; none for a `datasets` id, which names its own content."""
    path = Path(source.path).expanduser()
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file): spot_digest(file) for file in files}
