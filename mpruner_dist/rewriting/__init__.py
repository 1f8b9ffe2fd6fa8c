"""From a plan to a smaller checkpoint, file to file, and the proof that it is right."""
