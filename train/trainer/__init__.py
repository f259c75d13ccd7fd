"""The training loop and what it asks at each step.

Imports blocks, data, distributed, memory, model, report, runs, store, validation.
"""
