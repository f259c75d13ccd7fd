"""Where samples are read: from shards on this machine, as a store (`cogcommon.store` has the others), and from a cache
on a local disk of those that lie elsewhere.

Imports no other room.
"""
