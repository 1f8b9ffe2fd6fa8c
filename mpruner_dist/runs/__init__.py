"""The run folder: artefacts, manifests, commit by rename. Knows nothing of pruning."""
