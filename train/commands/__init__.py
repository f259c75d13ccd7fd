"""`cogtrain plan`, `generate` and `export`. (`lora` and `sft` are `trainer.loop`.)

Imports distributed, memory, model, report, runs, settings, store, trainer, validation.
"""
