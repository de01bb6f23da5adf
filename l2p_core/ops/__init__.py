"""Layer operations: rotary positions, tiles of the head, and variants that save memory or preserve the dtype."""
