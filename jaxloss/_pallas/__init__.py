"""Hand-written kernels, each file imported by the first call that takes one of it; ``dispatch``
says when."""
