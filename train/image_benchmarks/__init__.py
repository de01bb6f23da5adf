"""GenEval and DPG-Bench: their prompts, the folders that their scorers read, and the results of these."""
