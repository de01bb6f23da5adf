"""Measurements: `l2p benchmark head`, `l2p benchmark checkpoint` and `l2p benchmark transfer`."""
