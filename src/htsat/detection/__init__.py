"""From posteriors to events."""
