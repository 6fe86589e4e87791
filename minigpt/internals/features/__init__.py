"""Features: neurons, probes, steering vectors and sparse autoencoders."""
