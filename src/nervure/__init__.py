"""The methods of 294 neural-network papers on any PyTorch network."""

__version__ = "0.1.0"
