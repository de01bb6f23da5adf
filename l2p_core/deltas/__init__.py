"""The unchanged tensors that a delta refers to, its low-rank adapters, and its combination with a checked base."""
