"""A file as a person gave it: what is known of a clip, why one was refused, its content hash, and the part
of it that a line names.

Imports no other room.
"""
