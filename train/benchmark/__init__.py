"""Measurements: `l2p benchmark head`, `checkpoint`, `train`, `gpu` and `transfer`."""
