"""The host's folders: the choices they offer, the targets of results, and whether results are unchanged."""
