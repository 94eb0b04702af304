"""Marks in the text of a conversation around what is scored: noncharacters of Unicode, which no text may have."""

OPEN, CLOSE = "\ufdd2", "\ufdd3"
