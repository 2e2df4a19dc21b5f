"""What can be said of a run before it is run. `polgrad.check` reports all of it; a run looks at some.

| module | what it finds out |
|---|---|
| `reading` | how long the records are, what of them is trained, what becomes of too long ones |
| `duplicates` | which prompts occur twice, and which held-out ones in the training data |
| `canaries` | whether verifiers accept right answers, and refuse wrong ones and empty texts |
| `answers` | what an environment answers to an empty turn |
| `stops` | which tokens end a turn, and whether the model can draw them |
| `tracing` | whether the update can be traced with the arrays that its batches will have |
| `memory` | how many bytes parameters, optimizer, anchors, gradients and caches take on a device |
| `tables` | all of that as text |

The functions return data and print nothing; what is wrong is a `Finding`.
"""

from polgrad.checks.findings import Finding

__all__ = ['Finding']
