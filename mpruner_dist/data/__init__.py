"""Text, images and recordings to blocks of tokens, pixels and spectra: sources, reading, batches with global ids."""
