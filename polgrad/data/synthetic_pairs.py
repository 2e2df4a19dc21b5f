"""Preference pairs that nobody labelled: what most samples of a prompt say against what others say.

The example needs `from polgrad.data import synthetic_pairs`.
"""

from collections.abc import Sequence


def confident_pair(
  clusters: Sequence[int | str], scores: Sequence[float], draw: float, *, confidence: float = 0.5
) -> tuple[int, int] | None:
  """A synthetic preference among the samples of a prompt, or None: RLP-SPG (arXiv:2403.19279).

  If the largest cluster of equivalent samples has at least the fraction `confidence` of all samples, its
  member with the best score is preferred to a random sample of the other clusters.

  Args:
    clusters: number or name of the cluster of each sample. Of equally large clusters the first is taken.
    scores: of the samples, by a reward model.
    draw: uniform random number in [0, 1), which chooses the other sample.
    confidence: gamma in the paper.

  Returns:
    (preferred, other), indices of samples; None if no cluster is large enough, or all are equivalent.

  >>> synthetic_pairs.confident_pair([0, 0, 1, 0], [0.1, 0.9, 2.0, 0.3], draw=0.5)
  (1, 2)
  """
  sizes = {name: list(clusters).count(name) for name in dict.fromkeys(clusters)}
  if not sizes:
    return None
  largest = max(sizes, key=sizes.get)
  inside = [i for i, name in enumerate(clusters) if name == largest]
  outside = [i for i, name in enumerate(clusters) if name != largest]
  if len(inside) < confidence * len(clusters) or not outside:
    return None
  return max(inside, key=lambda i: scores[i]), outside[int(draw * len(outside))]
