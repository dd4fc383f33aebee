"""Programs to read: `python -m examples.digits`."""
