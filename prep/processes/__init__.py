"""Child processes for work that may crash or hang in native code, and the Ctrl-C that ends it.

Imports source.
"""
