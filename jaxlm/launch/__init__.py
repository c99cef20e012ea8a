"""Starts the processes of a run, watches them, and starts them again: `python -m jaxlm.launch local -- ...`."""
