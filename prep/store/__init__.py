"""Shards as files: written, committed, locked, and proved to be ours before anything is removed.

Imports show.
"""
