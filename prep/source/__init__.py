"""A file as a person gave it: what is known of a clip, why one was refused, its content hash.

Imports no other room.
"""
