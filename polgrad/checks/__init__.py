"""What can be said of a run before it is run. `polgrad.check` reports all of it; a run looks at some.

| module | question |
|---|---|
| `reading` | how long are prompts and completions, what is trained of them, what is done with those that are too long |
| `duplicates` | which prompts occur twice, and which held-out ones occur in the training data |
| `canaries` | do the verifiers accept right answers, and refuse wrong ones and empty texts |
| `stops` | which tokens end a turn, and can the model draw them |
| `tracing` | does the update trace, with the arrays that its batches will have |
| `memory` | how many bytes parameters, optimizer, anchors, gradients, caches and logits take on a device |
| `tables` | all of that as text |

The functions return data and print nothing; what is wrong is a `Finding`.
"""

from polgrad.checks.findings import Finding

__all__ = ['Finding']
