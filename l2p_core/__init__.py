"""What L2P adds to a transformer, once and free of ComfyUI: geometry, Detailer Head, conversion, training."""
