"""Judging a pixel model beside its source: statistics of pairs of images, and their report."""
