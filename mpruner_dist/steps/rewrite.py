"""The stage `rewrite`: the checkpoint without the layers, proven."""

from functools import partial

from mpruner_dist.checkpoints.folder import tokenizer_digests
from mpruner_dist.errors import UserError
from mpruner_dist.planning.budget import protected_layers
from mpruner_dist.road import Road, Step


def rewrite(road: Road) -> Step:
    """The checkpoint without the layers, proven."""
    plan = road.plan()
    inputs = {"model": road.model_id, "tokenizer": tokenizer_digests(road.source), "kept": plan.kept}

    def make() -> None:
        from mpruner_dist.rewriting.rewrite import rewrite_checkpoint

        if not plan.dropped and road.config.plan.method != "file":  # by hand: the original is to be retrained alone
            nothing = f"the plan removes nothing: {road.folder / 'plan.json'} keeps all {plan.num_layers} layers"
            if len(protected_layers(road.stacks(), road.config.plan)) == plan.num_layers:
                raise UserError(
                    f"{nothing}, for all of them always stay, by plan.protect_first, plan.protect_last or as the first "
                    "of a stack: lower plan.protect_first or plan.protect_last"
                )
            raise UserError(
                f"{nothing}. Lower plan.threshold, or set plan.method partition with plan.keep_layers; cka.json has "
                "the similarities"
            )
        rewrite_checkpoint(
            road.source,
            road.folder / "pruned",
            plan,
            trust_remote_code=road.config.model.trust_remote_code,
            run_tasks=partial(road.session.run_tasks, progress=road.folder / "logs/progress.json"),
        )

    return inputs, ("pruned",), make
