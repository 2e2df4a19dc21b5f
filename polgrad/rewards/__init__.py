"""Rewards of completions, computed on the host. Nothing here imports JAX.

| module | what is inside |
|---|---|
| `verifiers` | functions that judge one completion: exact match, numbers, formats, length |
| `combinations` | how the terms of a reward become one number |
| `comparisons` | functions that compare two completions of one prompt |
| `judge` | a language model that judges, asked over HTTP |
| `scoring` | runs verifiers over a batch, in worker processes if asked, and reports their failures |
"""

from polgrad.rewards import combinations, comparisons, judge, scoring, verifiers

__all__ = ['combinations', 'comparisons', 'judge', 'scoring', 'verifiers']
