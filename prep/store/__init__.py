"""Shards as files: written (`shards`), committed, rewritten, locked, and proved to be ours before anything is removed.

`outlet` is where an encode's shards go: a folder of this machine, or one behind an address (`remote_outlet`), of which
this machine has an image (`desk`).

Imports show.
"""
