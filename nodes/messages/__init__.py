"""What users see beside images: progress, a run's live view, errors in their words."""
