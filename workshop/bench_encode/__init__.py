"""How fast this machine encodes: ``python -m workshop.bench_encode FOLDER`` (see ``__main__``)."""
