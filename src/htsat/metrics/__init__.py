"""Scores of tags and events: pure functions on arrays and event lists. No torch here."""
