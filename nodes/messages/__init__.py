"""Messages to users: progress, a run's live view, and errors in their terms."""
