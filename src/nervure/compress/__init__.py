"""Pruning and other ways to make a network smaller."""
