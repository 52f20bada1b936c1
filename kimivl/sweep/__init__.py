"""Sweeps: which points there are and where each one's run lies, and what all of them have reached."""
