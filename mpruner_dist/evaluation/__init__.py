"""Quality, size and speed of the original, the pruned and the retrained model."""
