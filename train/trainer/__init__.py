"""The trainer, and what it asks at each step: `trainer.py` first.

Imports blocks, data, distributed, memory, model, report, runs, settings,
validation.
"""
