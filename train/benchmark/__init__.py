"""Measurements: the modules of the commands `l2p benchmark ...`, of the same names."""
