"""Prompts for a data set, written by the user's language model; this package instructs it, and checks, balances and
records the prompts.

`work.write` is the entry point: it takes slots (`scheme.slots`, or `rewriting.slots` for existing short prompts), a
folder, and a `writer.Writer`.
"""
