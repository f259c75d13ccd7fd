"""The command line: ``cogprep``, and ``python -m cogprep``."""

from functools import partial

from cogcommon.cli.beginning import begin

main = partial(begin, "cogprep")

if __name__ == "__main__":
    main()
