"""A run: `opening` checks what is asked and gives a `run.Run`; on disk it is a folder, the claim to it, its record,
checkpoints and metrics. Its copy in an object store has a room here, `mirror`.

Imports data, distributed, model, settings, store.
"""
