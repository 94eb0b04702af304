"""The attention op: `separator_attention` and its implementations."""
