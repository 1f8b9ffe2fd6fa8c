"""From a DeepSpeed checkpoint the universal one of the kept layers, moments of the optimizer included."""

import logging
import shutil
from pathlib import Path

from mpruner_dist.checkpoints.folder import with_tagged_floats
from mpruner_dist.checkpoints.formats import open_checkpoint
from mpruner_dist.checkpoints.zero_files import frozen_names, require_every_rank, step_folder
from mpruner_dist.cluster.universal import convert_to_universal, prune_universal
from mpruner_dist.errors import UserError
from mpruner_dist.plan import Keep
from mpruner_dist.rewriting.finished import LAYER_MAP, Request, is_made_by, layer_map
from mpruner_dist.rewriting.rewrite import Options, copy_companions, prepare, require_target
from mpruner_dist.runs.commit import commit_folder, disk_errors, require_space, write_json, write_text

log = logging.getLogger(__name__)
LATEST = "latest_universal"


def rewrite_universal(
    source: Path,
    target: Path,
    kept: Keep,
    *,
    config_folder: Path | None = None,
    preserve_pattern: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Write to `target` a universal checkpoint from which a training run of the kept layers goes on.

    Args:
        source: a DeepSpeed checkpoint of ZeRO 1 to 3. DeepSpeed unpickles it, as when it resumes: it must be trusted.
        target: a folder; an earlier rewrite there is replaced.
        kept: as for `rewrite_checkpoint`.
        config_folder: where config.json and the tokenizer lie, if not in `source`.
        preserve_pattern: as for `rewrite_checkpoint`.
        trust_remote_code: run model code that lies there.

    Raises:
        UserError: the source, the target or the plan cannot be used.
        StageFailure: DeepSpeed cannot convert it, or no space.
    """
    step = step_folder(source)
    if step is None:
        raise UserError(f"{source} is no DeepSpeed checkpoint: only those have the optimizer's moments to keep")
    require_every_rank(step)
    frozen = frozen_names(step)
    if frozen:
        raise UserError(
            f"{source} has {len(frozen)} parameters that are not trained, such as {frozen[0]}: DeepSpeed's universal "
            "checkpoints leave them out, and a run that goes on would have random ones"
        )
    checkpoint = open_checkpoint(source, config_folder)
    require_target(checkpoint, target)
    request = Request(checkpoint, kept, preserve_pattern=preserve_pattern)
    if is_made_by(request, target) and (target / LATEST).is_file():
        return
    rewrite = prepare(checkpoint, kept, Options(preserve_pattern=preserve_pattern, trust_remote_code=trust_remote_code))
    partial = target.with_name(f".{target.name}.partial-{request.digest}")
    with disk_errors(target):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        # float32 weights and two moments, and once more as fragments while DeepSpeed converts
        require_space(partial, 2 * sum(file.stat().st_size for file in step.iterdir() if file.is_file()))
        log.info("  DeepSpeed converts %s", step)
        convert_to_universal(step, partial / step.name)
        prune_universal(partial / step.name, rewrite.renamed)
        copy_companions(checkpoint.companions, partial, rewrite.kept)
    write_text(partial / LATEST, step.name)
    write_json(partial / "config.json", with_tagged_floats(rewrite.stored))
    write_json(partial / LAYER_MAP, layer_map(rewrite.kept_by_name) | {"request": request.digest})
    commit_folder(partial, target)
