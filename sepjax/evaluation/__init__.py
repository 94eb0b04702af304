"""Scores: perplexity, bits per byte, KV kept."""
