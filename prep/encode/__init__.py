"""The encode itself: decode processes -> VAE and T5 -> writer, over the planned shards of one process.

Imports dataset, plan, processes, settings, source, store, vae, video.
"""
