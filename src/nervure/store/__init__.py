"""Floor 6: records in and out."""

from nervure.store.place import default_path
from nervure.store.store import Store

__all__ = ["Store", "default_path"]
