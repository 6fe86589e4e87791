"""Data pipeline: text sources -> documents -> token shards -> batches that depend only on seed and batch number."""
