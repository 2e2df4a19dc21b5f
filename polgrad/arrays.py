"""Every array that a loss, an estimator of credit or a selection may name as an argument.

The names of a function's positional arguments say which arrays it reads (`registry.inputs`). `ARRAYS`
is the one list of these names. `B` rows, `T` positions, `V` vocabulary, `D` width of the model, `G`
rows of a group, `n` further completions of a prompt, `K` rewards, `Tk` k entries for each of `T` tokens.
The entry of a per-token array `x[b, t]` belongs to `tokens[b, t]`. Log-probabilities (`logp`) are in
nats, rewards and values in the unit of the reward.

Four further kinds of names exist. `<anchor>_logp`, for any anchor of the phase, is the log-probability
under that anchor, [B, T]. `<network>_scores`, for any network of the phase, is its score of each token,
[B, T]. `<term>_term`, for any term of the phase's reward that the collector's `terms` name, is what the
verifier said of the row, [B], before it is weighed. A configuration may also choose names: those of its
`stats` (of the collector or of the objective), `selections` and `history`. The names in `CONFIGURED` are
of these kinds; they are listed because functions in `losses` read them.
"""

from typing import NamedTuple

import jax


class Spec(NamedTuple):
  """What is known of an array."""

  shape: str  # 'B T', 'B', '' for a scalar, '...' for any
  doc: str  # what it is, its unit and who provides it
  made_of: str = ''  # the array that it is computed from, if the objective computes it from one


# Fields of `types.Batch`.
BATCH = {
  'tokens': Spec('B T', 'token ids, i32; from the sampler or the data'),
  'segment_ids': Spec('B T', 'which tokens see each other, i32, 0 is padding; from the same'),
  'mask': Spec('B T', 'tokens that the loss looks at, bool; from the same, narrowed by credit'),
  'behavior_logp': Spec('B T', 'log-prob under the sampling distribution; from the sampler'),
  'finished': Spec('B', 'whether a stop token was drawn, bool; from the sampler'),
  'prompt_ids': Spec('B', 'row of the prompt in the data set, i32; from the sampler'),
  'group_ids': Spec('B', 'equal for rows of one prompt, i32; from the sampler or the data'),
  'stream': Spec('B', 'index into types.STREAMS, i32; from a collector that mixes streams'),
  'sampled_at': Spec('B', 'batches that the phase had collected before, i32; from the collector'),
  'rewards': Spec('B', 'reward of the row, 0 where it is not valid; from the verifiers'),
  'valid': Spec('B', 'whether all verifiers of the row answered, bool; from the verifiers'),
  'baseline_rewards': Spec(
    'B n', 'rewards of n other completions of the prompt; from the verifiers'
  ),
  'staleness': Spec('B', 'batches collected between sampling and use, f32; from the collector'),
  'proximal_logp': Spec('B T', 'log-prob when the update phase began; from the collector'),
  'reference_logp': Spec('B T', 'log-prob under the anchor `reference`; from the collector'),
  'teacher_logp': Spec('B T', 'log-prob under the anchor `teacher`; from the collector'),
  'old_values': Spec('B T', 'critic before the token, when the phase began; from the collector'),
  'advantages': Spec('B T', 'unit of the reward, or normalised; from credit'),
  'returns': Spec('B T', 'targets of the critic; from credit'),
  'label': Spec(
    'B', '1 chosen or desirable, 0 rejected, or a probability; from credit or the data'
  ),
  'weights': Spec('B', 'factors of the losses of preference pairs; from the data'),
}

# Features that polgrad's own collectors and estimators add to a batch.
FEATURES = {
  'target': Spec('B', 'the number that the score of the row should be; from the data'),
  'uniform': Spec('B', 'one uniform random number in [0, 1) a row; from the collector'),
  'influences': Spec(
    'B K',
    'products of the gradient of each of K rewards with those of all, the same in all rows; from '
    '`collect.influences`',
  ),
  'replay_weight': Spec(
    'B', 'importance weight of a group that is used again, else 1; from `replay_correction`'
  ),
  'versions': Spec(
    'B T',
    'number of the weights that drew the token, i32: the batches used for training before them; from '
    '`collect.Rollouts.in_flight`',
  ),
  'token_staleness': Spec(
    'B T',
    'batches used for training since the weights that drew the token, f32; 0 outside the mask; from the '
    'same',
  ),
  'tracked_value': Spec(
    'B', 'success rate of the prompt in earlier steps, in [0, 1]; from the curriculum `spo`'
  ),
  'annotated_margin': Spec(
    'B', 'how much better the chosen row of the pair is, in both rows; from the data'
  ),
  'success_rate': Spec('B', "fraction of the group's rows that are right; from credit"),
  'shown_label': Spec(
    'B',
    'label of the completion that the prompt shows to be improved, 1 chosen, 0 rejected, -1 none; from '
    '`collect.Revisions`',
  ),
  'pair_side': Spec(
    'B', '1 for the chosen row of a group, -1 for the rejected one, else 0; from credit'
  ),
  'given_side': Spec(
    'B', 'the same of the pair that the record holds, where the group has further rows; from credit'
  ),
  'similarity': Spec('B', 'cosine between prompt and preferred completion; from the data'),
  'density_ratio': Spec(
    'B', 'p(prompt | good row) / p(prompt | bad row); from the data, `polgrad.prompt_weights`'
  ),
  'token_weights': Spec('B T', 'weights of the tokens of completions; from the data'),
  'mismatched_log_ratio': Spec(
    'B',
    'log pi - log reference of the prompt with the completion of another one, summed, nats, NaN where '
    'there is none; from the collector',
  ),
  'wins': Spec(
    'B G', 'probability that the row beats each of the G rows of its group; from comparisons'
  ),
  'baseline_wins': Spec(
    'B n', 'probability that the row beats n other completions of the prompt; from comparisons'
  ),
  'global_advantages': Spec('B T', 'advantages of groups against each other; from credit'),
  'local_weight': Spec('B', 'share of the comparison inside the group; from credit'),
  'step_ids': Spec(
    'B T', 'number of the step in the row, i32, from 0; -1 outside the mask; from `collect.Vines`'
  ),
  'step_values': Spec(
    'B T',
    'mean reward of further completions from the state before the step; from `collect.Vines`',
  ),
  'span_ids': Spec(
    'B T',
    'number of the scored part of the completion that the token is in, i32, from 0; -1 in none; from '
    '`Phase.spans`',
  ),
  'span_scores': Spec(
    'B T', 'score of that part, at each of its tokens; 0 in none; from `Phase.spans`'
  ),
  'node_values': Spec('B T', 'value of the tree node of the token; from `collect.Trees`'),
  'parent_values': Spec('B T', 'value of the node before it, 0 for the root; from `collect.Trees`'),
  'node_leaves': Spec('B T', 'trained leaves below the node of the token; from `collect.Trees`'),
  'parent_leaves': Spec('B T', 'trained leaves below the node before; from `collect.Trees`'),
  'injected': Spec(
    'B T',
    '1 for tokens that were given and not sampled, 0 for others; from `collect.Inpainted`',
  ),
  'opponent': Spec(
    'B', '1 for a row that another policy sampled, 0 for others; from the collector'
  ),
  'policy_only': Spec(
    'B T', '1 for tokens that anchors do not read, such as labels; from `collect.Quantiles`'
  ),
  'hinted': Spec(
    'B', '1 for a row that was drawn with a hint, 0 for others; from `collect.Hinted`'
  ),
  'turn_rewards': Spec(
    'B T',
    'reward of a turn at its last token in the mask, 0 elsewhere; sums to `rewards`; from the '
    'environment',
  ),
  'observation_ids': Spec(
    'B T',
    'number of what was read right before the turn, i32, positive and equal for equal tokens, 0 outside '
    'of turns; from the environment',
  ),
  'early_tokens': Spec(
    'B Tk', 'k tokens at each position, those of `early_targets`, i32; from `collect.EarlyTargets`'
  ),
  'early_targets': Spec(
    'B Tk',
    'running mean of the probabilities of these tokens, over the epochs of the row; from the same',
  ),
  'teacher_states': Spec(
    'B Tk', 'hidden state of a teacher on other devices that predicts the token; from the collector'
  ),
  'teacher_top_ids': Spec(
    'B Tk',
    'k likeliest tokens of a teacher elsewhere, i32, -1 where there are fewer; from the collector',
  ),
  'teacher_top_log_probs': Spec('B Tk', 'their log-probs under the teacher; from the same'),
  'partner_tokens': Spec(
    'B T',
    'tokens of another row, with whose embeddings those of the row are mixed, i32; from `MixedTargets`',
  ),
  'own_share': Spec('B', 'weight of the row in this mixture, in [0, 1]; from `MixedTargets`'),
  'mixed_tokens': Spec(
    'B Tk', 'tokens that are learned at each position, i32; from `MixedTargets`'
  ),
  'mixed_weights': Spec('B Tk', 'their weights, 0 outside of their masks; from `MixedTargets`'),
  'void_turns': Spec(
    'B T',
    '1 in the tokens of a turn in which the policy neither acted nor answered, 0 elsewhere; the metric '
    '`void` of the environment',
  ),
  'turn_players': Spec(
    'B T', 'player who took the turn of the token, i32, 0 outside the mask; from the environment'
  ),
}

# Arrays that only batches with several turns have. What reads them also works on batches without them.
OF_TURNS = ('turn_rewards', 'observation_ids', 'void_turns', 'turn_players', 'turn_ids')

# Fields of `types.Outputs`: they carry gradients.
MODEL = {
  'logp': Spec('B T', 'log-prob under the policy that is trained; from the model'),
  'entropy': Spec('B T', 'entropy of the next-token distribution, nats; from the model'),
  'values': Spec('B T', 'critic before the token; from the model'),
  'values_after': Spec(
    'B T', 'scalar head after the token, as reward models have it; from the model'
  ),
  'user_score': Spec('B', 'score of the row for its user; from the head `latent_user`'),
  'user_kl': Spec(
    'B', "KL of the posterior of the user's latent to the prior, nats; from the head `latent_user`"
  ),
  'view_loss': Spec(
    'B',
    "what two samples of the row's prompt do not tell of each other, nats; from the head `shared_views`",
  ),
}

# What an objective computes before it calls a function.
OBJECTIVE = {
  'turn_ids': Spec(
    'B T',
    'number of the turn in the row, i32, from 0; -1 outside the mask; turns are the runs of the mask '
    'unless the batch has the numbers',
  ),
  'first_value': Spec('B', 'critic before the first token of the mask', made_of='values'),
  'step': Spec('', 'updates of the phase so far, f32'),
  'noise': Spec('B T', 'one uniform random number in [0, 1) a token; in selections only'),
}

# What one family of objectives or one slot computes for the functions of one table.
LOCAL = {
  'log_ratio': Spec(
    'B T', 'logp - proximal_logp at the level of `ratio`, nats; in policy gradients'
  ),
  'loss': Spec('B T', 'loss of a token, unreduced; in aggregations'),
  'where': Spec('B T', 'tokens that are averaged, bool; in aggregations'),
  'score': Spec('B', 'score of the row, nats; in losses of single rows and of lists, times beta'),
  'preferred': Spec('B', 'True for the preferred row of each pair, bool; in pairs'),
  'gap': Spec('B', 'shaped score of the preferred row less that of the other; in pairs'),
  'margin': Spec('B', 'beta times `gap`, less the offsets; in preference losses'),
  'beta': Spec(
    '',
    'temperature of the regression, unit of the reward, in log_partition; in pointwise losses what '
    'multiplies the score',
  ),
  'scaled_rewards': Spec('B', 'rewards / beta, nats; in log_partition'),
  'residual': Spec('B', 'rewards / beta - score, nats; in log_partition'),
  'log_ratio_sum': Spec('B', 'log pi - log reference of the row, nats; in reward penalties'),
  'not_better': Spec(
    'B', 'how many samples of another policy have at most the reward of the row; in best_of_n'
  ),
  'compared_with': Spec('B', 'how many samples of another policy the prompt has; in best_of_n'),
  'log_t': Spec('B', 'log pi - log target of the row, nats; in f_divergences'),
  'token_rewards': Spec('B T', 'reward of a token: the row has its own at its last; in returns'),
  'token_returns': Spec('B T', 'sum of the rewards from the token on; in token baselines'),
  'log_rho': Spec('B T', 'proximal_logp - behavior_logp, nats; in corrected returns'),
}

# What a function inside the pass over the vocabulary gets: statistics of logits, divergences.
VOCABULARY = {
  'logits': Spec('... V', 'of the policy, divided by the temperature; from the model'),
  'teacher_logits': Spec('... V', 'of the anchor `teacher`; from the model'),
  'hidden': Spec('... D', 'state that the logits are computed from; from the model'),
  'context': Spec(
    '... T', 'tokens of the document before the token, i32, -1 in other columns; from the model'
  ),
  'context_mask': Spec('... T', 'which of these are in the mask, bool; from the model'),
}

# Statistics, selections and histories, under the names that functions of `losses` expect.
CONFIGURED = {
  'flow_scores': Spec('B T', 'network: how far a hidden state is from those of right answers'),
  'bonus_scores': Spec('B T', 'network: exploration bonus of the state after the token'),
  'critics_scores': Spec('B T', 'network: weight of the log-prob of the token'),
  'score_norm': Spec('B T', 'statistic: squared norm of the gradient of logp by the logits'),
  'score_fisher': Spec('B T', 'statistic: that gradient in the Fisher metric of the logits'),
  'hidden_norm': Spec('B T', 'statistic: squared norm of the hidden state'),
  'old_entropy': Spec(
    'B T', 'statistic: entropy of the policy when the batch is used, nats, without gradient'
  ),
  'proxy_logp': Spec('B T', 'statistic: log-prob under the distribution without its tail, nats'),
  'log_normalizer': Spec('B T', 'statistic: logsumexp of the logits'),
  'state_value': Spec('B T', 'statistic: value of the prefix before the token, unit of the reward'),
  'token_value': Spec('B T', 'statistic: value of the prefix with the token, unit of the reward'),
  'old_kl': Spec('B T', 'statistic: divergence between teacher and policy, nats'),
  'reference_kl': Spec('B T', 'statistic: KL(teacher || policy), nats'),
  'typical_logp': Spec('B T', 'statistic: log-prob that a token is compared with, nats'),
  'stratum_term': Spec('B', 'term of the reward: equal for rows of one stratum of a group'),
  'mode_term': Spec('B', 'term of the reward: positive for rows in the mode on'),
  'answer_term': Spec('B', 'term of the reward: equal for rows with the same answer'),
  'appeal_term': Spec('B', 'term of the reward: 1 for a rejected row whose appeal succeeded'),
  'excess_drift': Spec('', 'selection: coefficient of a penalty on the drift from the old policy'),
  'selected': Spec('B T', 'selection: chosen tokens, bool'),
  'signed_entropy': Spec('B T', 'selection: how high the entropy is, in [-1, 1], f32'),
  'normalized_weights': Spec('B T', 'selection: importance weights with mean 1, f32'),
  'prompt_weights': Spec('B T', 'selection: weights with which prompts count the same, f32'),
  'bounds': Spec('2', 'selection: least and largest ratio of the trust region'),
  'reference_selected': Spec('B T', 'selection: tokens chosen for the reference, bool'),
  'pair_factors': Spec('B', 'selection: factor of the pair, with mean 1; 0 if it is left out'),
  'matched_score': Spec('B', 'selection: score of the row that a row is compared with'),
  'matched_gap': Spec('B', "selection: reference margin of equal rank less the pair's own, nats"),
  'batch_beta': Spec('', 'selection: beta of the batch'),
  'gap_average': Spec('2', 'history: moving averages of mean and deviation of `gap`'),
  'kl_coefficient': Spec('', 'history: coefficient of the KL penalty, from its controller'),
  'entropy_coefficient': Spec('', 'history: coefficient of the entropy bonus, from its controller'),
  'mean_entropy': Spec('', 'history: mean entropy of earlier updates, nats'),
  'reference_point': Spec('', 'selection: score that counts neither as a gain nor as a loss'),
  'earlier_scores': Spec('2', 'history: sum and number of the scores of earlier updates'),
}

# Names with one meaning everywhere, which a configuration therefore cannot give to another array.
OWNED = BATCH | FEATURES | MODEL | OBJECTIVE | LOCAL | VOCABULARY
ARRAYS = OWNED | CONFIGURED


# Arrays with several entries for each token; a statistic of the logits gets those of its token.
WIDE = frozenset(name for name, array in ARRAYS.items() if array.shape == 'B Tk')
# Endings of arrays [B]: a term of the reward, and the score of an anchor's scalar head.
OF_ROWS = ('_term', '_head_score')


def shape_of(name: str) -> str:
  """The shape of an array by its name, as in `Spec`: '...' where any shape is possible."""
  if name in ARRAYS:
    return ARRAYS[name].shape
  return 'B T' if name.endswith(('_logp', '_scores')) else 'B' if name.endswith(OF_ROWS) else '...'


def per_token(name: str, x: jax.Array, mask: jax.Array) -> bool:
  """Whether an array has one entry for each token: by its listed shape, or by that of the mask."""
  if name in OWNED:
    return OWNED[name].shape == 'B T'
  return x.shape == mask.shape
