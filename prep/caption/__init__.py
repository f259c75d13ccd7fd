"""Captions by a vision-language model: frames of a clip, the model, its words made a caption, the list's blank lines.

Imports dataset, source, video.
"""
