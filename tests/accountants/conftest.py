import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from accountants.registry import ACCOUNTANTS

#: The exact reference, under a name like the others, so that a test can ask both in the same way.
ACCOUNTANTS["contour"] = ("laplace_reference", "ContourAccountant", "saddle-line Laplace inversion, reference")
