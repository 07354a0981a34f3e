"""Text in, batches out: corpora, vocabulary, shards, the plan, the stream."""
