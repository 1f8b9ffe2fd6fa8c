"""Ray workers and tasks, DeepSpeed engines and collectives. Knows nothing of pruning."""
