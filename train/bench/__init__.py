"""Benchmark of the training step: the product beside a plain diffusers + PEFT loop, in one run.

Weights are random ones of the published shapes, and so are the samples: time and
memory do not depend on values. ``python -m cogtrain.bench --help``.
"""
