"""Prompts for a data set, written by a language model of the user's: instructed here, checked, balanced, recorded.

`work.write` is the entry point: it takes slots (`scheme.slots`, or `rewriting.slots` for short prompts that exist), a
folder, and a `writer.Writer`.
"""
