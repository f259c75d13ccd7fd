"""From shards to batches: which samples, in which order, with which random draws, collated ahead of the step;
and the prompts that a person gives.

Imports model, settings, store.
"""
