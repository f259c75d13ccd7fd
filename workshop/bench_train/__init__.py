"""Benchmark of the training step: the product beside a plain loop of diffusers, PEFT and accelerate, in one run.

Weights are random ones of the published shapes, and so are the samples: time and
memory do not depend on values. ``python -m workshop.bench_train --help``.
"""
