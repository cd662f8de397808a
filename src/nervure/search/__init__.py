"""Search over hyper-parameters and architectures."""
