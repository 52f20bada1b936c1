"""Measurements beside other ways to do the same; a script's docstring says what it measures and how long it takes."""

import sys
from pathlib import Path

# A script puts its own folder on the path, where kernels.py would pass for the package of that name, which
# transformers looks for.
sys.path[:] = [folder for folder in sys.path if Path(folder or ".").resolve() != Path(__file__).resolve().parent]
