"""Measurements: exact replay of drafts."""
