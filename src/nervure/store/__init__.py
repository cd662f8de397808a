"""Floor 6: records in and out."""
