"""The verbs that study a model: each opens a run, runs one analysis, and prints the result or JSON."""
