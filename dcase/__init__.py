"""The task: the challenge's data, its models, and how they are trained, tested and delivered.

Every script and command imports this first, before torch is loaded.
"""

import os

# How often an OpenMP thread of torch's (GNU's libgomp, which reads it when it is loaded) looks for work before it
# sleeps: about 0.1 ms. Its own 300,000 are several milliseconds, in which a thread on a busy core waits for one that
# does not run. benchmarks/step.py --busy measures it.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
