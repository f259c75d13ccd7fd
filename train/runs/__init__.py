"""A run on disk: its folder, its claim to it, its record, checkpoints and metrics.

Imports data, distributed, model, settings, store.
"""
