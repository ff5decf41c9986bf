"""Benchmarks: one harness, one file a question. ``make bench``, ``make bench-gpu``."""
