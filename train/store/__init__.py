"""Where shards lie, and the one way to read them: this machine, http, object stores, a cache before those.

Imports no other room.
"""
