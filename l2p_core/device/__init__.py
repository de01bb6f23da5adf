"""The machine: its accelerators and memory, and what a bug report says about it."""
