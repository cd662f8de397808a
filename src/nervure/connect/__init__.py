"""Floor 5: hooks of `nervure.learn.Loop` in the loops of Lightning, Hugging Face and skorch."""

from nervure._kit import lazy_attributes

__getattr__, __dir__ = lazy_attributes(
    __name__,
    {
        "LightningHooks": "nervure.connect.lightning",
        "SkorchHooks": "nervure.connect.skorch",
        "TransformersHooks": "nervure.connect.transformers",
    },
)
