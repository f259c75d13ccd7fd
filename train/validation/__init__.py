"""Held-out loss, videos of held-out captions and of prompts, and the pipeline that runs tuned weights.

Imports blocks, data, distributed, model, runs, settings.
"""
