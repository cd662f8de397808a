"""Records for the trackers people look at already: MLflow and TensorBoard."""

from nervure._kit import lazy_attributes

__getattr__, __dir__ = lazy_attributes(
    __name__,
    {
        "to_mlflow": "nervure.report.tracking.mlflow",
        "to_tensorboard": "nervure.report.tracking.tensorboard",
    },
)
