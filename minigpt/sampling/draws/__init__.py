"""What sampling needs of a model, the noise, and the choice of a token."""
