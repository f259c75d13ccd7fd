"""The command line that both programs share: settings as dataclasses, help, errors, progress, names
printed harmlessly.

Imports errors, files, words.
"""
