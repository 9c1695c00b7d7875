"""Doors to other people's files: one foreign format per module."""
