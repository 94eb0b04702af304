"""Text to batches: tokenizer, corpora, packing, pipeline."""
