"""The engines of an encode, a row each: this machine, or a Ray cluster with one actor a GPU.

Imports encode, plan, processes, settings, source, store.
"""
