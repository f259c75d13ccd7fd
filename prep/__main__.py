"""``python -m cogprep`` is the command line."""

from .cli import main

main()
