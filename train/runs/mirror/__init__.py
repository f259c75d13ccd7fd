"""A run's copy in an object store (--mirror): `mirror` keeps it, `index` says what is in it, `restore` fetches it.

Imports distributed, model; of `runs` the checkpoints, the claim and the folder.
"""
