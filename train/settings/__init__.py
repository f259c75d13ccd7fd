"""What every command of `cogtrain` takes: an option is a field. `training` holds those of a run, `planning` those of
what is asked before one, `results` those of what shows a run and uses what was trained.

Imports no other room.
"""
