"""Handing a run to a batch system that starts it elsewhere: the Jobs server of a Ray cluster."""
