"""The `json_lines` dataset."""
