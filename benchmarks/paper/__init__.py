"""The paper's own experiment, on the user's files."""
