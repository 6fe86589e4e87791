"""Text sources -> documents -> token shards -> batches, the batch number alone deciding what is in a batch."""
