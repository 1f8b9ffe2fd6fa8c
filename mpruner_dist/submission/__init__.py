"""Handing a run to a batch system that starts it elsewhere: Slurm, or the Jobs server of a Ray cluster."""
