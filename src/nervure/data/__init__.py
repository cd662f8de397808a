"""Data sets: bundled, synthetic and the user's own, each as one `Splits`."""

from nervure.data.fashion import fetch_fashion_mnist
from nervure.data.sources import load, names
from nervure.data.splits import Arrays, Splits, parts, split

__all__ = ["Arrays", "Splits", "fetch_fashion_mnist", "load", "names", "parts", "split"]
