"""The machine: its accelerators and memory, and the facts about it for a bug report."""
