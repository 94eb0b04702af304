"""Texts of JSON lines that are read where they lie, by an index of where each record is."""
