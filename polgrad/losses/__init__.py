"""Losses and what they are made of: pure functions on arrays.

The modules import only jax, chex, `polgrad.types` and `polgrad.registry`. Each lists its functions in a
`TABLE`. The right column names the slot that they fill: an argument of an objective
(`polgrad.objectives`) or of a credit estimator (`polgrad.credit`).

    module              what its functions compute                               slot
    ------------------  -------------------------------------------------------  ---------------------
    surrogates          policy-gradient losses of one token                      surrogate, probes
    path_consistency    squared residuals of path consistency learning           surrogate, probes
    ratios              log importance ratios of tokens, turns or rows           ratio, proximal
    weights             detached importance weights of tokens                    weights
    trust_region_masks  weights that are 1 in a trust region, else 0             weights
    penalties           KL estimators, entropy bonus, value errors, likelihood   penalties, loss
    divergences         KLs, Jensen-Shannon, ... between teacher and student     divergence, penalties
    logit_stats         numbers computed from the next-token distribution        stats, loss
    selections          tokens chosen, or weighed, in the whole minibatch        selections
    aggregation         means of token losses over tokens or rows                aggregation
    implicit_rewards    scores of rows from their log-probabilities              score
    pair_scores         scores that look at both rows of a pair                  score
    score_shapes        functions of a row's score, as f' of a divergence        shape
    preference_losses   losses of a preference pair                              link
    score_penalties     penalties on the scores of a pair                        penalties
    pair_offsets        what the margin of a pair must exceed                    offsets
    pair_weights        weights of pairs                                         weights
    pair_selections     comparisons of the pairs of the whole minibatch          selections
    pointwise           losses of single rows                                    loss
    listwise            losses of all completions of a prompt                    loss
    prefix_values       targets for the values of prefixes                       target
    log_partition       estimates of log Z for a regression on rewards           center
    advantages          advantages of rows from their rewards; normalisers       advantage, normalizer
    baselines           advantages with weighted, chosen or sampled baselines    advantage
    difficulty          advantages that depend on the share of right answers     advantage
    strata              advantages among rows of one kind in a group             advantage
    multipliers         factors of advantages                                    multiplier
    reward_maps         rewards made of rewards                                  reward
    row_scores          numbers by which rows of a group are kept                score
    row_choices         which rows of a batch an objective sees                  rows
    pareto              volumes that points dominate                             none: credit calls it
    reward_penalties    costs that are subtracted from rewards                   costs
    f_divergences       derivatives of the generators of f-divergences           derivative
    returns             returns, generalised advantages, V-trace, Retrace        none: credit calls it
    trees               advantages of steps and of tree nodes                    none: credit calls it
    process_rewards     rewards of tokens from scores of parts of a completion   none: credit calls it
    conflicts           weights of tokens that good and bad rows share           none: credit calls it
    entropy_shaping     advantages of turns by the entropy of the policy         none: credit calls it
    down_sampling       rows and tokens that teach most                          none: credit calls it
    best_of_n           the distribution of the best of n samples                none: call it yourself
    denoising           MaPO, preferences between images of a diffusion model     none: call it yourself
    auxiliary_rewards   scores and losses of flows, RDD's predictor and V0       rewards
    discounted_values   values at several discounts, PopArt; choices of tokens   choose
    embedding_rewards   rewards of embeddings, as in GRACE                       none: collectors call it
    latent_preferences  reward models with a latent variable for each user       none: heads call it
    self_improvement    SRPO, whose scores are of three prompts                  none: listwise calls it
    shared_information  the representation loss of RLP                           none: heads call it
    groups              means and variances over groups of rows                  none: modules above
    pairs               the preferred and the other rows of pairs                none: modules above
    turns               numbers of turns, and sums over their tokens             none: modules above

A loss without configuration. Arrays have the shape [B, T] of rows and tokens; `mask` is True for the
tokens that count.

>>> import jax.numpy as jnp
>>> from polgrad import losses
>>> log_ratio, mask = jnp.zeros((2, 3)), jnp.array([[True, True, True], [True, False, False]])
>>> loss = losses.surrogates.clipped(log_ratio, jnp.ones((2, 3)), eps_high=0.28)
>>> print(float(losses.aggregation.token_mean(loss, mask).value()))
-1.0
"""

from polgrad.losses import (
  advantages,
  aggregation,
  auxiliary_rewards,
  baselines,
  best_of_n,
  conflicts,
  denoising,
  difficulty,
  discounted_values,
  divergences,
  down_sampling,
  embedding_rewards,
  entropy_shaping,
  f_divergences,
  groups,
  implicit_rewards,
  latent_preferences,
  listwise,
  log_partition,
  logit_stats,
  multipliers,
  pair_offsets,
  pair_scores,
  pair_selections,
  pair_weights,
  pairs,
  pareto,
  path_consistency,
  penalties,
  pointwise,
  preference_losses,
  prefix_values,
  process_rewards,
  ratios,
  returns,
  reward_maps,
  reward_penalties,
  row_choices,
  row_scores,
  score_penalties,
  score_shapes,
  selections,
  self_improvement,
  shared_information,
  strata,
  surrogates,
  trees,
  trust_region_masks,
  turns,
  weights,
)

__all__ = [
  'advantages',
  'aggregation',
  'auxiliary_rewards',
  'baselines',
  'best_of_n',
  'conflicts',
  'denoising',
  'difficulty',
  'discounted_values',
  'divergences',
  'down_sampling',
  'embedding_rewards',
  'entropy_shaping',
  'f_divergences',
  'groups',
  'implicit_rewards',
  'latent_preferences',
  'listwise',
  'log_partition',
  'logit_stats',
  'multipliers',
  'pair_offsets',
  'pair_scores',
  'pair_selections',
  'pair_weights',
  'pairs',
  'pareto',
  'path_consistency',
  'penalties',
  'pointwise',
  'preference_losses',
  'prefix_values',
  'process_rewards',
  'ratios',
  'returns',
  'reward_maps',
  'reward_penalties',
  'row_choices',
  'row_scores',
  'score_penalties',
  'score_shapes',
  'selections',
  'self_improvement',
  'shared_information',
  'strata',
  'surrogates',
  'trees',
  'trust_region_masks',
  'turns',
  'weights',
]
