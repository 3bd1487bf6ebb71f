"""Python imports this at its start where its folder is on PYTHONPATH: see lines.py."""

import os
import sys
from pathlib import Path

if os.environ.get("MUTATION_RECORD") and os.environ.get("MUTATION_TEST"):
    sys.path.append(str(Path(__file__).parent.parent))
    import lines

    lines.begin_child()
