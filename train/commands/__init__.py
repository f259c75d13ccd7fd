"""The commands, one file each: `plan` (its lines: `forecast`), `doctor`, `launch`, `watch`, `generate`, `compare` and
`export`. `lora` and `sft` are `trainer.trainer`.

Imports blocks, data, distributed, memory, model, report, runs, settings, trainer, validation.
"""
