"""The commands, one file each; `encode` only chooses the processes, its work is in `prep/encode`.

Imports dataset, encode, plan, processes, published, settings, show, source, split, store, vae, video.
"""
