"""Saves and restores training state: Orbax writes the arrays, a SHA-256 manifest decides what counts."""
