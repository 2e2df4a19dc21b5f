from functools import partial

from polgrad import collect, objectives
from polgrad.losses import aggregation, penalties, weights
from polgrad.methods.base import Method
from polgrad.registry import AtLeastOne, Fraction, part, weighted
from polgrad.sampling import behavior_policies


def unlikelihood_sequence(*, n: AtLeastOne = 4, sampled_weight: Fraction = 0.5) -> Method:
  """Unlikelihood of sequences (arXiv:1908.04319): repeated n-grams of own completions, pushed down.

      loss = sampled_weight token mean over greedy completions of -1[t repeats] log(1 - pi(y_t))
             + (1 - sampled_weight) token mean over the answers of -log pi

  A token repeats if it is inside an n-gram that the completion has had before; all tokens of the
  completion count in the mean. 1 - pi is at least 1e-5.

  Differences: A batch has a greedy completion and the answer of each prompt, and its loss is the mean of
  the two. The paper draws one of the two losses for each update, each half of the time.
  Completions begin behind the prompt, while the paper continues the first 50 tokens of a text by 100.

  Args:
    n: tokens of an n-gram.
    sampled_weight: weight of the own completions, in [0, 1].

  Confidence: CODE (formula), MEMORY (weight).
  """
  mean = part(aggregation.token_mean)
  answers = part(objectives.Supervised, aggregation=mean)
  repeats = part(
    objectives.Supervised,
    loss=part(penalties.unlikelihood),
    weights={'repeated': part(weights.repeated_ngram, n=n)},
    aggregation=mean,
  )
  return Method(
    collect=partial(
      collect.Rollouts,
      samples_per_prompt=1,
      demonstrations=1,
      behavior_policy=part(behavior_policies.greedy),
    ),
    objective=part(
      objectives.WeightedSum,
      streams={
        'demonstration': weighted(1.0 - sampled_weight, answers),
        'sampled': weighted(sampled_weight, repeats),
      },
    ),
    learns='imitate',
  )
