"""Where things lie in the repository."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
KIT = ROOT / "tests/kit"
CHILDREN = ROOT / "tests/children"  # programs that tests start; in costs/, those that measure memory and time
# The PYTHONPATH of those programs: the workshop is not installed, and the packages may not be, either; some of them
# import one another, and with PYTHONSAFEPATH, which our programs set, Python does not look beside a script.
CHILDREN_PATH = os.pathsep.join([*map(str, (ROOT, KIT, CHILDREN)), *filter(None, [os.environ.get("PYTHONPATH")])])
