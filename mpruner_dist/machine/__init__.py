"""The machine and the cluster themselves: what they are (`mpruner env`), and whether they work (`mpruner doctor`)."""
