"""The model protocol, random numbers, and the choice of a token."""
