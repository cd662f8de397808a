"""The contracts and saboteurs, shipped for plugins."""
