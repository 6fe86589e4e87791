"""Text sources -> documents -> token shards -> batches."""
