"""Several processes: ranks, sharding, and which settings work across processes."""
