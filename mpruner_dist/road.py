"""What the stages of one run share: the configuration, the run folder, the checkpoint, Ray."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from mpruner_dist.checkpoints.folder import read_checkpoint
from mpruner_dist.checkpoints.source import resolve_source
from mpruner_dist.cluster.address import cluster_address
from mpruner_dist.cluster.settings import quantized, read_deepspeed_config
from mpruner_dist.config import Config
from mpruner_dist.plan import Plan, read_plan
from mpruner_dist.runs.digest import digest
from mpruner_dist.runs.folder import Inputs, RunFolder

if TYPE_CHECKING:
    from mpruner_dist.cluster.session import RaySession

Step = tuple[Inputs, tuple[str, ...], Callable[[], None]]
"""What a stage is made from, the files that it makes, and the function that makes them."""


class Road:
    """The place where the stages of one run find what they share.

    A round of pruning has a road of its own; `run` is that of the whole run, whose text, Ray and original it uses,
    and `layers` its model's layers by their numbers there.

    Unfinished work lies in folders named by the digest of its inputs, so that it is never taken for another's.
    """

    def __init__(
        self, config: Config, folder: RunFolder, *, run: "Road | None" = None, layers: list[int] | None = None
    ) -> None:
        self.config, self.folder, self.run, self.layers = config, folder, run, layers
        self.source = resolve_source(config.model.path, config.model.revision)
        self.checkpoint = read_checkpoint(self.source)
        self.model_id = self.checkpoint.fingerprint()
        self.original: Path = run.original if run else self.source
        self.original_id: str = run.original_id if run else self.model_id
        self.data: Path = run.data if run else folder / "data"
        self._session: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._session is not None:
            self._session.__exit__(*error)

    @property
    def session(self) -> "RaySession":
        """Ray, connected at first use."""
        if self.run:
            return self.run.session
        if self._session is None:
            from mpruner_dist.cluster.session import RaySession

            self._session = RaySession(self.config.cluster, self.folder.path, self._model_folders())
        return self._session  # type: ignore[no-any-return]

    def _model_folders(self) -> list[Path]:
        """The folders outside the run's own that workers read."""
        distillation = self.config.retrain and self.config.retrain.distillation
        teacher = distillation and distillation.teacher
        other = [Path(teacher).expanduser().absolute()] if teacher else []
        return [self.source, *(folder for folder in other if folder.is_dir())]  # a hub id is fetched when it is needed

    def join_cluster(self) -> None:
        """Join a cluster that the configuration names now: what is wrong with it shall be told before long work."""
        if cluster_address(self.config.cluster):
            self.session.connect()

    def layer_of_original(self, layer: int) -> int:
        """The number that a layer had in the original model."""
        return layer if self.layers is None else self.layers[layer]

    @property
    def result(self) -> Path:
        """The folder of the model that the road leads to."""
        return self.folder / ("pruned" if self.config.retrain is None else "retrained")

    def plan(self) -> Plan:
        """The plan that the stage of this name made."""
        return read_plan(self.folder / "plan.json", sum(self.stacks()))

    def stacks(self) -> list[int]:
        """How many of the layers are in each stack, once similarities are collected."""
        similarity = json.loads((self.folder / "cka.json").read_text())
        return list((similarity["stacks"] or {"": len(similarity["layers"])}).values())

    def blocks(self, part: str) -> Path:
        """The blocks of a part of the data."""
        return self.data / f"{part}.safetensors"

    def text(self, part: str) -> str:
        """Digest of the blocks of a part of the data."""
        return str(self._part(part)["digest"])

    def num_blocks(self, part: str) -> int:
        """How many blocks a part of the data has."""
        return int(self._part(part)["blocks"])

    def _part(self, part: str) -> dict[str, Any]:
        parts: dict[str, dict[str, Any]] = json.loads((self.data / "data.json").read_text())["parts"]
        return parts[part]

    def work(self, kind: str, inputs: Inputs) -> Path:
        """The folder for unfinished work from these inputs."""
        work = self.folder / kind / digest(inputs)
        work.mkdir(parents=True, exist_ok=True)
        return work

    def rounding(self) -> Inputs:
        """What of `cluster.deepspeed` results of forward passes depend on: nothing, unless it quantizes."""
        rounded = quantized(read_deepspeed_config(self.config.cluster.deepspeed))
        return {"deepspeed": rounded} if rounded else {}

    def on_workers(
        self, stage: str, job: Any, given: Inputs | None = None, *,
        usable: Callable[[int], bool] = lambda _: True, prepare: Callable[[int], None] = lambda _: None, **spec: Any,
    ) -> None:  # fmt: skip
        """Run a job on all workers under a DeepSpeed configuration, `cluster.deepspeed` unless another is given.

        `usable` says whether a number of workers can share the work, `prepare` is called with it before they start.
        """
        given = read_deepspeed_config(self.config.cluster.deepspeed) if given is None else given
        self.session.run_workers(
            job, spec | {"config": self.config, "deepspeed": given}, stage, self.folder.path,
            usable=usable, prepare=prepare,
        )  # fmt: skip
