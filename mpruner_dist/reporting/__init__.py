"""One self-contained page and a model card from the artefacts of a run."""
