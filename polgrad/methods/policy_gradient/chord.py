from functools import partial
from typing import Annotated, Literal

from polgrad import collect, credit, objectives, optim
from polgrad.data import sources
from polgrad.losses import advantages, aggregation, penalties, surrogates, weights
from polgrad.methods.base import Method
from polgrad.registry import Count, Fraction, Range, part, weighted


def chord(
  *,
  warmup: Count = 200,
  decay: Count = 400,
  peak: Fraction = 0.5,
  valley: Fraction = 0.02,
  eps: float = 0.2,
  weigh: Literal['undecided', 'probability', 'alike'] = 'undecided',
  cutoff: Annotated[float, Range(above=0, at_most=1)] = 1.0,
  others: Count = 0,
  answers: str = '',
) -> Method:
  """CHORD (arXiv:2508.11408): GRPO beside demonstrations that matter less as the run proceeds.

      loss = (1 - mu) token mean over the samples of -min(r A, clip(r, 1 - eps, 1 + eps) A)
             + mu token mean over the demonstrations of -sg(p (1 - p)) min(log pi, log cutoff)
      A_i = (R_i - mean_g) / (std_g + 1e-6)

  r = pi / pi_old and p = pi(token). Mean and std are those of the samples, without the demonstration.
  mu rises from 0 to `peak` in `warmup` updates and falls by a half cosine to `valley` in `decay`
  updates. The weight p (1 - p) leaves out tokens that the policy knows or finds impossible; the
  authors compare it with p (`weigh=probability`, that of `dft`) and with 1 (`weigh=alike`). Their runs
  with another schedule: warmup 0, decay 200, peak 0.9, valley 0.05 and the weight 1 (CHORD-mu), and
  mu = 0.1 throughout (peak = valley = 0.1, warmup 0) with p (1 - p) (CHORD-phi).

  The authors draw demonstrations from other data than prompts: 64 for 256 samples, 8 of a prompt, which
  is `others=2` with a file of `answers`.

  Differences: By default every prompt has its own answer as the demonstration beside its samples. The
  authors average the token means of micro-batches, by their rows of each kind.

  Args:
    warmup: updates in which mu rises.
    decay: updates in which mu falls.
    peak: largest mu.
    valley: mu at the end.
    eps: distance of the clipping bounds from 1.
    weigh: the weight of a token of a demonstration.
    cutoff: probability above which such a token is not imitated; 1, as in the authors' runs, is none.
    others: demonstrations of other prompts beside the samples of each prompt; 0 takes its own answer.
    answers: a file of JSON lines that they are of; '' takes other records of the task.

  Raises:
    ValueError: `answers` without `others`.

  Confidence: CODE.
  """
  if answers and not others:
    raise ValueError(f'chord: answers={answers!r} is not read with others=0')
  mu = dict(warmup=warmup, decay=decay, peak=peak, valley=valley)
  mean = part(aggregation.token_mean)
  kinds = {'undecided': weights.undecided, 'probability': weights.probability}
  found = {weigh: part(kinds[weigh])} if weigh in kinds else {}
  likelihood = part(penalties.nll, cutoff=cutoff)
  imitate = part(objectives.Supervised, aggregation=mean, loss=likelihood, weights=found)
  reinforce = part(
    objectives.PolicyGradient,
    surrogate=part(surrogates.clipped, eps_low=eps, eps_high=eps),
    aggregation=mean,
  )
  advantage = part(advantages.group_normalized, ddof=1, eps=1e-6)
  file = {'demonstrations': part(sources.jsonl, path=answers)} if answers else {}
  return Method(
    collect=partial(collect.Rollouts, **({'others': others} if others else {'demonstrations': 1})),
    source=partial(sources.with_demonstrations, count=others, **file) if others else None,
    credit=part(credit.of_samples, credit=part(credit.outcome, advantage=advantage)),
    objective=part(
      objectives.WeightedSum,
      streams={'demonstration': weighted(1.0, imitate), 'sampled': weighted(1.0, reinforce)},
      schedules={
        'demonstration': part(optim.rise_and_fall, **mu),
        'sampled': part(optim.rise_and_fall_rest, **mu),
      },
    ),
  )
