"""Where things lie in the repository."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
KIT = ROOT / "tests/kit"
CHILDREN = ROOT / "tests/children"  # programs that tests start; in costs/, those that measure memory and time
# The PYTHONPATH of those programs: the workshop is not installed, and the packages may not be, either.
CHILDREN_PATH = os.pathsep.join([str(ROOT), str(KIT), *filter(None, [os.environ.get("PYTHONPATH")])])
