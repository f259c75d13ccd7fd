"""What is trained and how: inputs and loss, the diffusion's maths, LoRA, full fine-tuning, EMA.

Imports distributed, settings.
"""
