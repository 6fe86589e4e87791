"""The model interface of sampling, random numbers, and the choice of a token."""
