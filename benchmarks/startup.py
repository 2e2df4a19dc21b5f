"""CPU seconds that imports take, the median of several fresh processes.

    python -m benchmarks.startup

`python -X importtime -c 'import polgrad.train'` says which modules they are.
"""

import os
import statistics
import subprocess
import sys

MODULES = ('jax', 'polgrad.losses', 'polgrad.train')
REPEATS = 5


def seconds(module: str) -> float:
  """CPU seconds of a process that only imports this module."""
  before = os.times()
  subprocess.run([sys.executable, '-c', f'import {module}'], check=True)
  after = os.times()
  return after.children_user + after.children_system - before.children_user - before.children_system


if __name__ == '__main__':
  for module in MODULES:
    seconds(module)  # the first one reads the files
    print(f'{module:16} {statistics.median(seconds(module) for _ in range(REPEATS)):.2f} s')
