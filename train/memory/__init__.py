"""Whether a run fits, and how long it takes: memory, disk and seconds by arithmetic, beside what was measured.

Imports blocks, data, distributed, model, offload, runs, settings.
"""
