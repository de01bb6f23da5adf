"""Making the second tiny world's autoencoder and source, on a CPU or a GPU: `python -m comfyui_l2p.train.scenes`."""
