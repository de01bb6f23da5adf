"""The host's folders: what can be chosen, where results may go, and whether they are still as they were left."""
