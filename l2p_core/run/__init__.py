"""A training run as a whole: its recipe, its folder, what it shows. Both the command line and the host's nodes call it.

`loop.train` is the entry: a checked `recipe.Recipe`, a folder, `hooks.Hooks` to watch and stop it.
"""
