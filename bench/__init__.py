"""Benchmarks and the demo. Every figure in the docs names the command of this folder that prints it."""

import os

# OpenMP's threads (torch's) would go on spinning into the next contestant's turn. Set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
