from functools import partial

from polgrad import collect, objectives
from polgrad.losses import preference_losses
from polgrad.methods.base import Method
from polgrad.registry import part


def pairwise_preference(*, label_smoothing: float = 0.0) -> Method:
  """Pairwise preference model (arXiv:2405.07863): a score that has read both completions.

      loss = mean over pairs of softplus(-g(w, l))
      g(y, y') = s(x, y', x, y) - s(x, y, x, y')
      s = scalar head on the state at the last token of the whole row

  A row is the prompt with one completion, then the prompt again with the other. g is antisymmetric
  whatever s is, so P(y beats y') = sigmoid(g(y, y')) and P(y' beats y) add up to one, and the order
  in which a model prefers to be shown completions cancels. Unlike a difference of two separate scores,
  g can say that a beats b, b beats c and c beats a.

  Args:
    label_smoothing: probability that a label is wrong, in [0, 1/2].

  Differences: the authors' model answers A or B as text, learns from one random order of each pair, and
  averages its probabilities over both orders when it is used. Here both orders are trained, with one
  logit, and logits are averaged instead of probabilities. A score of both completions is one scalar,
  which classifiers of Hugging Face can store; it costs two passes of each pair of completions.

  Confidence: CODE (the idea and its antisymmetry); the form with a scalar head is DERIVED.
  """
  return Method(
    collect=partial(collect.Preferences, before='other'),
    objective=part(
      objectives.RewardModel,
      link=part(preference_losses.logistic),
      label_smoothing=label_smoothing,
    ),
    warm_start=False,
  )
