"""Files that are there whole or not at all, and the rules for touching anything of a person's.

Atomic writes, locks, whose a file is, one door for what a machine refuses, JSON read into types, threads that
read, names that are nearly right, and how much memory may be taken.

Imports errors, words.
"""
