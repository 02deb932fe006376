"""The report of a run: one self-contained page (`python -m evaluate report`)."""
