"""The verbs that look inside a model: each opens a run, asks one question, and prints the answer or --json."""
