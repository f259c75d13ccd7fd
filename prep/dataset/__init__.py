"""The data root: its lists, each clip examined before it is encoded, and advice about the whole.

Imports source, video.
"""
