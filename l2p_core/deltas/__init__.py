"""What a delta keeps, its low-rank parts, and laying it on a base whose content is checked."""
