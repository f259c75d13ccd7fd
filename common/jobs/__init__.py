"""Jobs for schedulers: what is to run on how many machines, the file that says so, its check, and who takes it.

Imports cli, errors, files, store.
"""
