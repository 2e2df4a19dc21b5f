"""Rewards of completions, computed on the host. Nothing here imports JAX.

| module | what is inside |
|---|---|
| `verifiers` | functions that judge one completion: exact match, numbers, formats, length |
| `scoring` | runs verifiers over a batch, in worker processes if asked, and reports their failures |
"""

from polgrad.rewards import scoring, verifiers

__all__ = ['scoring', 'verifiers']
