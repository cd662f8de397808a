"""Floor 8: run, compare, audit, find and export as functions. The only place that joins runner, store and report."""

from nervure._kit import lazy_attributes

__getattr__, __dir__ = lazy_attributes(
    __name__,
    {
        "Comparison": "nervure.app.comparisons",
        "Examination": "nervure.app.auditing",
        "Landscape": "nervure.app.landscapes",
        "Pruning": "nervure.app.pruning",
        "Ran": "nervure.app.claims",
        "audit": "nervure.app.auditing",
        "check_store": "nervure.app.upkeep",
        "compare": "nervure.app.contests",
        "compare_prune": "nervure.app.comparisons",
        "copy_store": "nervure.app.upkeep",
        "export": "nervure.app.exports",
        "export_tracking": "nervure.app.exports",
        "landscape": "nervure.app.landscapes",
        "prune": "nervure.app.pruning",
        "prune_store": "nervure.app.upkeep",
        "run": "nervure.app.claims",
    },
)
