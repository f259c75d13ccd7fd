"""What every command of `cogprep` takes: an option is a field. `encode` holds those of encode and validate, `lists`
those of the commands that write lists, `shards` those of the commands that read a folder of shards or clean it.

Imports dataset, source, video.
"""
