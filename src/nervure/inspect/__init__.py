"""Diagnostics of networks."""
