"""Text to token blocks: sources, tokenising, packing, batches with global ids."""
