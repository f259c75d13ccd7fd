"""Files behind addresses: how they are read, and how a folder there is written.

`address` tells an address from a path, `store` is the one way to read, `fsspec_store` reaches object stores,
`remote_folder` reads and writes a folder there: what commands use whose ``--out`` is ``s3://...``.

Imports cli, errors, files, words.
"""
