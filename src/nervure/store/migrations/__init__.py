"""Revisions of the store's schema, run by alembic from inside the package."""
