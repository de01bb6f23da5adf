"""Judging a pixel model beside its source: statistics of images, reports, and the layouts and scores of benchmarks."""
