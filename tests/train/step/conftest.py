"""What one test of the engine computes, others compute with too: `from test_engine import gradients`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
