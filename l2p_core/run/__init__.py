"""A complete training run: its recipe, its folder, its output. The command line and the host's nodes both call it.

`loop.train` is the entry point: it takes a checked `recipe.Recipe`, a folder, and `hooks.Hooks` to watch and stop it.
"""
