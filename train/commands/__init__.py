"""`cogtrain plan` (its lines: `forecast`), `doctor`, `watch`, `generate` and `export`.

`lora` and `sft` are `trainer.trainer`.

Imports blocks, distributed, memory, model, report, runs, settings, store, trainer, validation.
"""
