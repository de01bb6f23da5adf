"""Training data on disk: folders of captioned images as batches, and the features of their captions."""
