"""Readers under comparison: each runs in a process of its own, with the packages of its own environment."""
