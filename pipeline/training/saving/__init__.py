"""Checkpoints of a run: their layout, and how they are written, fenced, kept, read and left behind."""
