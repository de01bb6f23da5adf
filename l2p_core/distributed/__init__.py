"""Several processes: ranks, sharding, and the settings that work across processes."""
