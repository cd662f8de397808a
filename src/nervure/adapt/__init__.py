"""Continual learning and adaptation."""
