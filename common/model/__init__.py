"""The CogVideoX families, one row each; their checkpoints, found, examined and loaded; the built-in model;
GPUs by name.

Imports cli, errors, files, libraries, words.
"""
