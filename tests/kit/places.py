"""Where things lie in the repository."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
KIT = ROOT / "tests/kit"
CHILDREN = ROOT / "tests/children"  # programs that tests start
CHILDREN_PATH = os.pathsep.join(map(str, (ROOT, KIT)))  # their PYTHONPATH: the workshop is not installed
