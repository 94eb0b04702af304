"""The `records` dataset."""
