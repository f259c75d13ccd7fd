"""A file as a person gave it: what is known of a clip, why one was refused, its content hash, and the part
of it that a line names. One behind an address is brought (`remote`) to a cache of this machine (`clip_cache`).

Imports no other room.
"""
