"""What the two programs agree on: the contract of a set of shards, and the record beside each tar.

Imports errors, files, libraries, model.
"""
