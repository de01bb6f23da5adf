"""A stand-in for comfy-aimdo, by which ComfyUI moves weights in and out of a GPU's memory ("dynamic VRAM").

The real one works inside CUDA's and ROCm's drivers. This one gives the host what it asks of it on the simulated
accelerator: weights come to the device when they are used, and stay while there is room.
"""
