"""The CogVideoX families, one row each; their checkpoints, found, examined and loaded; the built-in model.

Imports errors, files, words.
"""
