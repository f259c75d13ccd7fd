"""The command line that both programs share: settings as dataclasses, help, errors, names printed harmlessly.

Imports errors, files.
"""
