"""How fast this machine encodes: ``python -m cogprep.bench FOLDER`` (see ``__main__``)."""
