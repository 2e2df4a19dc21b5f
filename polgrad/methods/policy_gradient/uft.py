from functools import partial
from typing import Literal

from polgrad import collect, credit, objectives, optim
from polgrad.collect import beginnings
from polgrad.losses import advantages, aggregation, penalties, surrogates
from polgrad.methods.base import Method, choice
from polgrad.registry import Fraction, part, weighted


@choice('reveal', {'cosine': ('hinted', 'low', 'high'), 'stage': ('hinted',), 'uniform': ()})
def uft(
  *,
  steps: int,
  reveal: Literal['cosine', 'stage', 'uniform'] = 'cosine',
  hinted: Fraction = 0.6,
  chunks: int = 5,
  low: float = 0.05,
  high: float = 0.95,
  imitation: float = 0.001,
  eps: float = 0.2,
  kl_coefficient: float = 0.001,
  entropy_coefficient: float = 0.001,
) -> Method:
  """UFT (arXiv:2505.16984): samples begin with a part of the answer, which is imitated and shrinks.

      sampled: token mean of -min(r A, clip(r, 1 - eps, 1 + eps) A) + kl_coefficient k3
               - entropy_coefficient H
      hints:   imitation (token mean over given tokens of -log pi)
      given chunks ~ Binomial(n, p),  p = low + (high - low) (1 + cos(pi s / S)) / 2

  The loss is the sum of both. The answer is cut into n <= `chunks` chunks. All samples of a prompt begin
  with the same ones, which are no part of the first loss. s is the number of the batch, from 1, and
  S = `hinted` of all batches; after them nothing is given. r = pi / pi_old, H is the entropy of the
  next token in nats, k3 estimates the KL to the first policy, and A is the reward minus the group mean,
  divided by the standard deviation of the group.

  Two variants of the authors give other numbers of chunks. `reveal='stage'` begins with whole answers
  and gives one chunk less after each of n + 1 equal stages of the S batches. `reveal='uniform'` draws
  the number uniformly from 0 to n in all batches; with imitation=0 this is their R3.

  Differences: The tokens that are given are imitated once for each prompt, by a further row of its
  group; the authors have them in every row of the group, so their token mean is the same. They clamp
  logits to +-100 in that loss. Chunks have equal numbers of tokens; theirs are steps of the solution.

  Args:
    steps: batches of the run; the run fills it in.
    reveal: how many chunks are given.
    hinted: fraction of them in which a part of the answer may be given.
    chunks: largest number of chunks.
    low: p at the end of the schedule of `cosine`.
    high: p at its beginning.
    imitation: weight of the likelihood of given tokens.
    eps: distance of the clipping bounds from 1.
    kl_coefficient: of k3, nats.
    entropy_coefficient: of the entropy, nats.

  Confidence: CODE.
  """
  mean = part(aggregation.token_mean)
  reinforce = part(
    objectives.PolicyGradient,
    surrogate=part(surrogates.clipped, eps_low=eps, eps_high=eps),
    aggregation=mean,
    penalties={
      'kl': weighted(kl_coefficient, part(penalties.k3)),
      'bonus': weighted(entropy_coefficient, part(penalties.negative_entropy)),
    },
  )
  imitate = part(objectives.Supervised, aggregation=mean)
  advantage = part(advantages.group_normalized, ddof=1, eps=1e-6)
  sizes = dict(steps=max(round(hinted * steps), 1), chunks_at_most=chunks)
  reveals = {
    'cosine': part(beginnings.annealed_chunks, low=low, high=high, **sizes),
    'stage': part(beginnings.staged_chunks, **sizes),
    'uniform': part(beginnings.uniform_chunks, chunks_at_most=chunks),
  }
  return Method(
    collect=partial(collect.Rollouts, beginning=reveals[reveal], hints=1),
    credit=part(credit.of_samples, credit=part(credit.outcome, advantage=advantage)),
    objective=part(
      objectives.WeightedSum,
      streams={'demonstration': weighted(imitation, imitate), 'sampled': weighted(1.0, reinforce)},
    ),
    anchors={'reference': part(optim.fixed)},
  )
