"""The command line `l2p`: recipes, data sets, demo and benchmarks on top of l2p_core, free of ComfyUI."""
