"""The `recall` dataset."""
