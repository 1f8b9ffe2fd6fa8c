"""Commands that need no run, a module each for what they are about; `cli.py` puts them beside those of a run."""
