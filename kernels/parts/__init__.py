"""Device functions and small kernels that all families share."""
