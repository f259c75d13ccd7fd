"""The command line: ``cogtrain``, and ``python -m cogtrain``, by which the launcher starts the processes of a run."""

from functools import partial

from cogcommon.cli.beginning import begin

main = partial(begin, "cogtrain")

if __name__ == "__main__":
    main()
