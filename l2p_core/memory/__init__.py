"""Where weights are stored, in which type, and what a run or a sampling step needs of memory."""
