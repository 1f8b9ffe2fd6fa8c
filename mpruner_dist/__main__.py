"""`python -m mpruner_dist` is `mpruner`."""

from mpruner_dist.cli import main

main()
