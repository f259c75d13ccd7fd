"""Child processes for work that may crash or hang in native code.

Imports source.
"""
