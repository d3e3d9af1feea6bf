"""Settings of every process that runs tests, made before torch is imported."""

import os

# Test processes share the cores: by default each thread of torch's OpenMP runtime spins for
# milliseconds after a kernel before it sleeps, which takes half of the CPU time of a small step.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
