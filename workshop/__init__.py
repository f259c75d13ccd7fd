"""Where the built-in models are made and the project is measured. Not part of the installed programs.

``python -m workshop.draw`` draws a data set, ``python -m workshop.pretrain`` trains the built-in models,
``python -m workshop.bench_encode`` and ``python -m workshop.bench_train`` time the two programs, ``python -m
workshop.million`` what planning takes of a list of any length. All run from the repository's root.
"""
