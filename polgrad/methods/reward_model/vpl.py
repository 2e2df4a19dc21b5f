from functools import partial

from polgrad import collect, objectives
from polgrad.data import sources
from polgrad.losses import implicit_rewards, preference_losses, score_penalties
from polgrad.methods.base import Method
from polgrad.objectives import heads
from polgrad.registry import part, weighted


def vpl(
  *,
  context: int = 8,
  latent: int = 512,
  hidden: int = 512,
  attention: bool = True,
  kl_weight: float = 3e-6,
  kl_period: int = 0,
  user_field: str = 'user',
  context_seed: int = 0,
) -> Method:
  """Variational preference learning (arXiv:2408.10075): a reward model of users who differ in taste.

      loss = mean over pairs of softplus(-(r(w, z) - r(l, z))) + kl_weight KL(q || N(0, I)),  z ~ q
      q = q(z | other pairs of the user), a Gaussian;  r(y, z) = MLP of the state after y, beside z

  A Bradley-Terry model gives every completion one score, so users with opposite tastes cancel. Here an
  encoder reads `context` further pairs of the user who labelled a pair, and the score is one for that
  user. Model, encoder and r are trained together. Records name the user in a field. In an evaluation z
  is the mean of q, and each user is measured if there are at most ten.

  Args:
    context: other pairs of the user that the encoder reads; a user with fewer has all of them read.
    latent: size of z.
    hidden: size of the hidden layers.
    attention: whether the pairs attend to each other before they are averaged.
    kl_weight: of the KL. Near 1 the posterior is the prior, and the model is a Bradley-Terry model. The
      authors' runs have 3e-6, 0 and 1e-4.
    kl_period: updates in which the weight rises from a tenth to `kl_weight`, again and again; 10,000 in
      the authors' runs. 0: it is constant.
    user_field: field of the records with the user.
    context_seed: of the draw of the other pairs.

  Differences: in an evaluation the authors' code does not scale z to the length that it has in training;
  here both are scaled.

  Confidence: CODE.
  """
  head = part(heads.LatentUser, context=context, latent=latent, hidden=hidden, attention=attention)
  divergence = part(score_penalties.user_divergence, period=kl_period)
  return Method(
    source=partial(sources.with_context, field=user_field, pairs=context, seed=context_seed),
    collect=partial(collect.UserPreferences, context=context, user=user_field),
    objective=part(
      objectives.RewardModel,
      link=part(preference_losses.logistic),
      score=part(implicit_rewards.user_score),
      penalties={'user_divergence': weighted(kl_weight, divergence)},
      head=head,
    ),
    warm_start=False,
  )
