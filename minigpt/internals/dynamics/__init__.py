"""Dynamics: how a model's behaviour and internals change over the context, over training and between models."""
