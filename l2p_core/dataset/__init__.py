"""Training data on disk: folders of captioned images as batches, and their captions' features."""
