"""Rewards of completions, computed on the host. Nothing here imports JAX.

| module | what is inside |
|---|---|
| `verifiers` | functions that judge one completion: exact match, numbers, formats, length |
| `comparisons` | functions that compare two completions of one prompt |
| `scoring` | runs verifiers over a batch, in worker processes if asked, and reports their failures |
"""

from polgrad.rewards import comparisons, scoring, verifiers

__all__ = ['comparisons', 'scoring', 'verifiers']
