"""``python -m cogtrain``: how the launcher starts the processes of a run."""

from .cli import main

main()
