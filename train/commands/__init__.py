"""`cogtrain plan` (its lines: `forecast`), `generate` and `export`. (`lora` and `sft` are `trainer.trainer`.)

Imports distributed, memory, model, report, runs, settings, store, trainer, validation.
"""
