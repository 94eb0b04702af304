"""The `embedded` dataset."""
