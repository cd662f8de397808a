"""Floor 6: records in and out."""

from nervure.store.checking import Checked, Finding, check
from nervure.store.copying import Copied, copy
from nervure.store.papers import FeedState, Papers, Subscription
from nervure.store.place import default_path
from nervure.store.pruning import Pruned, prune
from nervure.store.store import Store

__all__ = [
    "Checked",
    "Copied",
    "FeedState",
    "Finding",
    "Papers",
    "Pruned",
    "Store",
    "Subscription",
    "check",
    "copy",
    "default_path",
    "prune",
]
