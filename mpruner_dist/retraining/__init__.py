"""A DeepSpeed engine in worker actors that heals the pruned model, and the export of its result."""
