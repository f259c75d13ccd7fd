"""The command line that both programs share: settings as dataclasses, help, errors, progress, names
printed harmlessly, the signals that stop a command, output that nobody reads any more.

Imports environment, errors, files, words.
"""
