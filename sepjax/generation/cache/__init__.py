"""Streaming without end over a bounded cache: the cache, and the forward pass over a run of tokens."""
