"""Neural tangent kernels and their relatives."""
