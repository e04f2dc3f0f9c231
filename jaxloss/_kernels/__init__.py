"""Hand-written kernels, one a file, each imported by the first call that takes it."""
