"""The life of a run; start with fit."""
