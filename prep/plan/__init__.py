"""What an encode will do, before it does it: which samples are there, which are new, which go, which shard.

Imports dataset, processes, settings, source, store, video.
"""
