"""Floor 0: errors, lazy imports and text formatting, on the standard library alone."""

from nervure._kit.errors import (
    BadBudget,
    BadData,
    BadModel,
    CouldNotRun,
    Diverged,
    MissingExtra,
    NervureError,
    NoEffect,
    NotDeterministic,
    OverBudget,
    StoreError,
    UnknownId,
    Unsupported,
    UsageError,
)
from nervure._kit.lazy import lazy_attributes, require
from nervure._kit.text import bytes_text, did_you_mean, seconds_text

__all__ = [
    "BadBudget",
    "BadData",
    "BadModel",
    "CouldNotRun",
    "Diverged",
    "MissingExtra",
    "NervureError",
    "NoEffect",
    "NotDeterministic",
    "OverBudget",
    "StoreError",
    "UnknownId",
    "Unsupported",
    "UsageError",
    "bytes_text",
    "did_you_mean",
    "lazy_attributes",
    "require",
    "seconds_text",
]
