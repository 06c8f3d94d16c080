"""Many adapters on one frozen base: they share every matmul of the base, in training and in inference."""
