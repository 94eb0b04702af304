"""The `text_folder` dataset."""
