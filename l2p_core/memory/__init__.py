"""Where weights are stored and in which dtype, and how much memory a run or a sampling step needs."""
