"""Held-out loss and videos, and the pipeline that runs tuned weights.

Imports blocks, data, distributed, model, runs.
"""
