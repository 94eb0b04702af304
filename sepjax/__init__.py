"""SepLLM in JAX: separator-sparse attention, KV-cache compression and endless streaming generation."""

__version__ = "0.1.0"
