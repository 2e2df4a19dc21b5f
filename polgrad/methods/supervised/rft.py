from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import aggregation
from polgrad.methods.base import Method
from polgrad.registry import AtLeastOne, part
from polgrad.sampling import behavior_policies


def rft(*, samples: AtLeastOne = 8, threshold: float = 1.0, same: str = '') -> Method:
  """RFT (arXiv:2308.01825): the base model learns the answers and a tuned model's right samples.

      loss = -token mean of log pi over the answer and samples with R >= threshold, each text once

  The samples are of the anchor `reference`, the policy after the phase before (supervised learning on
  the answers); the policy itself begins again with the base model. Of completions with the same matches
  of `same`, such as the same equations in the same order, one is kept. If all were kept, the expected
  gradient of the samples' part would be that of log P(right sample).

  Differences: The paper draws 100 samples of each prompt once. Here a prompt gets `samples` new ones
  whenever it is drawn, and duplicates are those of one draw. Verifiers judge the record's answer too.

  Args:
    samples: drawn for a prompt.
    threshold: least reward of a completion that is learned.
    same: regular expression of what makes two completions equal; '' is all words.

  Confidence: MEMORY (the formula is certain).
  """
  return Method(
    collect=partial(
      collect.Rollouts,
      samples_per_prompt=samples,
      demonstrations=1,
      behavior_policy=part(behavior_policies.reference),
      choose=part(collect.picks.distinct, threshold=threshold, pattern=same),
    ),
    objective=part(objectives.Supervised, aggregation=part(aggregation.token_mean)),
    anchors={'reference': part(optim.fixed)},
    restart=True,
    learns='imitate',
  )
