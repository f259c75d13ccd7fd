"""The commands, one file each; `encode` only chooses the processes, its work is in `prep/encode`. `inspection` is
`cogprep inspect`, `foretell` and `verdict` are parts of `validate`.

Imports caption, dataset, encode, engines, plan, processes, settings, show, source, split, store, vae, video.
"""
