"""vtmix: domain mixtures for fine-tuning that follow what the model knows (VersaTune, arXiv 2411.11266)."""

import os

# OpenMP threads that spin while they wait take the core another process needs: beside a busy neighbour a 23 s run took
# 351 s on two cores. It must be set before any library starts OpenMP, hence here.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
