"""Floor 5: small tagged models."""
