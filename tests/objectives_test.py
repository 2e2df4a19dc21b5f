"""What every objective owes: additivity, blindness to padding, symmetry, honest requirements."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad import methods, objectives, optim, packing, registry
from polgrad.losses import (
  aggregation,
  divergences,
  implicit_rewards,
  log_partition,
  penalties,
  pointwise,
  preference_losses,
  row_choices,
  surrogates,
  weights,
)
from polgrad.reductions import Max, Mean
from polgrad.registry import UnknownArray, Weighted, part
from tests import examples
from tests.runs import method_of

OBJECTIVES = {
  'sft': method_of('sft').bound()[1],
  'iq_learn': method_of('iq_learn').bound()[1],
  'reinforce': method_of('reinforce').bound()[1],
  'ppo': method_of('ppo').bound()[1],
  'grpo': method_of('grpo').bound()[1],
  'dr_grpo': methods.dr_grpo(max_new_tokens=7).bound()[1],
  'dapo': method_of('dapo').bound()[1],
  'gspo': method_of('gspo').bound()[1],
  'dpo': objectives.Pairwise(
    score=implicit_rewards.log_ratio_sum,
    link=preference_losses.logistic,
    beta=0.1,
    label_smoothing=0.1,
  ),
  'ipo': method_of('ipo').bound()[1],
  'simpo': method_of('simpo').bound()[1],
  'slic': method_of('slic').bound()[1],
  'distillation': method_of('on_policy_distillation').bound()[1],
  'forward_kl': objectives.Distillation(
    divergence=divergences.forward_kl, aggregation=aggregation.sequence_mean
  ),
  'truncated_is': objectives.PolicyGradient(
    surrogate=surrogates.truncated,
    aggregation=aggregation.token_mean,
    weights={'mismatch': functools.partial(weights.truncated_importance, cap=2.0)},
    penalties={'k2': Weighted(0.1, penalties.k2)},
  ),
  'regression': objectives.Regression(
    score=implicit_rewards.log_ratio_sum,
    center=log_partition.group_mean,
    beta=0.5,
    rows_per_prompt=2,
  ),
  'logistic': objectives.Pointwise(
    score=implicit_rewards.log_ratio_sum, loss=pointwise.logistic, beta=0.1
  ),
}
EACH = pytest.mark.parametrize('name', OBJECTIVES)


def loss_of(objective, x, batch, counts=None, step=0):
  terms, metrics = objective.apply(
    examples.outputs(x, objective.stats), batch, objective.init(), step=step
  )
  shares = [
    Mean(total=t.total, count=t.count if counts is None else counts[k]).value()
    for k, t in terms.items()
  ]
  return sum(shares), (terms, metrics)


def value_and_grad(objective, x, batch, counts=None):
  fn = jax.value_and_grad(lambda x: loss_of(objective, x, batch, counts), has_aux=True)
  (loss, aux), grads = fn(jax.tree.map(jnp.asarray, x))
  return loss, grads, aux


@EACH
def test_02_micro_batches_add_up_to_the_batch(name):
  objective = OBJECTIVES[name]
  x, batch = examples.leaves(), examples.batch()
  loss, grads, (terms, metrics) = value_and_grad(objective, x, batch)
  counts = {k: t.count for k, t in terms.items()}
  # All pieces at once, each as a batch by itself.
  parts = 4
  each = jax.vmap(lambda x, own: value_and_grad(objective, x, own, counts))
  losses, found, (_, reported) = each(*packing.split((x, batch), parts, 2))
  np.testing.assert_allclose(losses.sum(), loss, rtol=1e-5, atol=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
    packing.join(found, 2),
    grads,
  )
  for key, whole in metrics.items():
    pieces = [jax.tree.map(lambda a, i=i: a[i], reported[key]) for i in range(parts)]
    split = functools.reduce(lambda a, b: a + b, pieces)
    np.testing.assert_allclose(split.value(), whole.value(), rtol=1e-5, atol=1e-6)


@EACH
def test_masked_slots_change_nothing(name):
  objective = OBJECTIVES[name]
  x, batch = examples.leaves(), examples.batch()
  loss, grads, _ = value_and_grad(objective, x, batch)
  for poison in (np.nan, 1e9):
    spoil = lambda a, poison=poison: np.where(
      batch.mask.reshape(*batch.mask.shape, *(1,) * (a.ndim - 2)), a, np.float32(poison)
    )
    bad_x = {k: v if k == 'logits' else spoil(v) for k, v in x.items()}
    per_token = ('behavior_logp', 'proximal_logp', 'reference_logp', 'teacher_logp',
                 'advantages', 'returns', 'old_values')  # fmt: skip
    bad = batch.replace(**{k: spoil(getattr(batch, k)) for k in per_token})
    bad_loss, bad_grads, _ = value_and_grad(objective, bad_x, bad)
    np.testing.assert_array_equal(bad_loss, loss)
    jax.tree.map(np.testing.assert_array_equal, bad_grads, grads)


@EACH
def test_permuting_pairs_permutes_gradients(name):
  objective = OBJECTIVES[name]
  x, batch = examples.leaves(), examples.batch()
  order = np.array([6, 7, 2, 3, 0, 1, 4, 5])
  loss, grads, _ = value_and_grad(objective, x, batch)
  other, other_grads, _ = value_and_grad(objective, *jax.tree.map(lambda a: a[order], (x, batch)))
  np.testing.assert_allclose(other, loss, rtol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b[order], rtol=1e-5, atol=1e-7), other_grads, grads
  )


@EACH
def test_nothing_to_look_at_gives_zero(name):
  objective = OBJECTIVES[name]
  x, batch = examples.leaves(), examples.batch()
  empty = batch.replace(mask=np.zeros_like(batch.mask))
  fn = jax.jit(jax.value_and_grad(lambda x: loss_of(objective, x, empty)[0]))
  loss, grads = fn(jax.tree.map(jnp.asarray, x))
  assert loss == 0
  assert all(not np.any(g) for g in jax.tree.leaves(grads))


@EACH
def test_counts_do_not_depend_on_outputs(name):
  objective = OBJECTIVES[name]
  batch = examples.batch()
  counts = [
    {k: float(t.count) for k, t in loss_of(objective, examples.leaves(seed), batch)[1][0].items()}
    for seed in (1, 2)
  ]
  assert counts[0] == counts[1]


@EACH
def test_requirements_are_exact(name):
  """Fields beyond `requires` may be absent; each required one is read."""
  objective = OBJECTIVES[name]
  x, batch = examples.leaves(), examples.batch()
  always = {'tokens', 'segment_ids', 'mask', 'group_ids', 'features'}
  lean = batch.replace(
    **{k: None for k in batch.__dataclass_fields__ if k not in objective.requires | always},
    features={k: v for k, v in batch.features.items() if k in objective.requires},
  )
  full = batch.replace(weights=None)
  out = examples.outputs(x, objective.stats)
  kept = {k: getattr(out, k) if k in objective.requires else None for k in ('entropy', 'values')}
  terms, _ = objective.apply(out.replace(**kept), lean, objective.init(), step=0)
  wanted, _ = objective.apply(out, full, objective.init(), step=0)
  for key in wanted:
    np.testing.assert_array_equal(terms[key].value(), wanted[key].value())
  for field in objective.requires - {'teacher_logits'}:
    holder = {'entropy': 'out', 'values': 'out'}.get(field, 'batch')
    with pytest.raises((KeyError, AttributeError)):
      if holder == 'out':
        objective.apply(out.replace(**{field: None}), full, objective.init(), step=0)
      else:
        objective.apply(out, full.replace(**{field: None}), objective.init(), step=0)


def test_square_batches_do_not_broadcast():
  """B == T: a per-row array must not slip in where a per-token one belongs."""
  x, batch = examples.leaves(length=8), examples.batch(length=8)
  assert batch.tokens.shape == (8, 8)
  objective = OBJECTIVES['grpo']
  loss, _, _ = value_and_grad(objective, x, batch)
  wider, wide = examples.leaves(length=8), batch
  pad = lambda a: np.pad(a, [(0, 0), (0, 1)]) if a.ndim == 2 else a
  wide = jax.tree.map(pad, wide)
  wider = {k: np.pad(v, [(0, 0), (0, 1), *[(0, 0)] * (v.ndim - 2)]) for k, v in wider.items()}
  np.testing.assert_allclose(value_and_grad(objective, wider, wide)[0], loss, rtol=1e-6)
  with pytest.raises((ValueError, AssertionError)):
    objective.apply(examples.outputs(x, {}), batch.replace(advantages=batch.rewards), (), step=0)


def test_duplicating_a_pair_leaves_other_losses():
  objective = OBJECTIVES['dpo']
  x, batch = examples.leaves(), examples.batch()
  twice = np.array([0, 1, 0, 1, 2, 3, 4, 5, 6, 7])
  _, grads, (terms, _) = value_and_grad(objective, x, batch)
  more = jax.tree.map(lambda a: a[twice], (x, batch))
  _, more_grads, (more_terms, _) = value_and_grad(objective, *more)
  assert terms['preference'].count == 3 and more_terms['preference'].count == 4
  np.testing.assert_allclose(more_grads['logp'][4:] * 4, grads['logp'][2:] * 3, rtol=1e-5)


def test_label_below_one_half_turns_the_pair_round():
  objective = objectives.Pairwise(
    score=implicit_rewards.log_ratio_sum, link=preference_losses.logistic, beta=0.3, offset=0.7
  )
  x, batch = examples.leaves(), examples.batch().replace(weights=None)
  swap = np.arange(8).reshape(4, 2)[:, ::-1].reshape(-1)
  turned = jax.tree.map(lambda a: a[swap], (x, batch))
  np.testing.assert_allclose(
    value_and_grad(objective, *turned)[0], value_and_grad(objective, x, batch)[0], rtol=1e-6
  )


def test_failed_rows_do_not_pull_the_centre_of_their_group():
  """A row that is masked out has no say in the consistency loss of its group."""
  objective = objectives.Regression(
    score=implicit_rewards.log_ratio_sum, center=log_partition.group_mean, rows_per_prompt=4
  )
  x, batch = examples.leaves(), examples.batch()
  batch = batch.replace(group_ids=np.repeat([0, 1], 4).astype(np.int32))
  _, grads, (terms, _) = value_and_grad(objective, x, batch)
  without = np.array([0, 1, 2, 3, 6, 7])
  _, fewer, (fewer_terms, _) = value_and_grad(
    objective, *jax.tree.map(lambda a: a[without], (x, batch))
  )
  np.testing.assert_allclose(grads['logp'][without], fewer['logp'], rtol=1e-5, atol=1e-7)
  assert terms['regression'].count == fewer_terms['regression'].count == 6


class TestWeightedSum:
  def test_is_the_sum(self):
    x, batch = examples.leaves(), examples.batch()
    a, b = OBJECTIVES['grpo'], OBJECTIVES['sft']
    both = objectives.WeightedSum(streams={'a': Weighted(0.3, a), 'b': Weighted(2.0, b)})
    wanted = 0.3 * value_and_grad(a, x, batch)[0] + 2.0 * value_and_grad(b, x, batch)[0]
    np.testing.assert_allclose(value_and_grad(both, x, batch)[0], wanted, rtol=1e-6)
    assert both.requires == a.requires | b.requires

  def test_streams_own_their_rows(self):
    x, batch = examples.leaves(), examples.batch()
    owners = {'demonstration': OBJECTIVES['sft'], 'sampled': OBJECTIVES['grpo']}
    mixed = batch.replace(stream=np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int32))
    for order in (owners, dict(reversed(owners.items()))):
      both = objectives.WeightedSum(streams={k: Weighted(1.0, v) for k, v in order.items()})
      _, _, (terms, _) = value_and_grad(both, x, mixed)
      assert terms['demonstration/nll'].count == batch.mask[[0, 1, 4, 5]].sum()
      assert terms['sampled/policy'].count == batch.mask[[2, 3, 6, 7]].any(axis=1).sum()

  def test_a_stream_without_an_objective_counts_for_none(self):
    x, batch = examples.leaves(), examples.batch()
    mixed = batch.replace(stream=np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int32))
    only = objectives.WeightedSum(streams={'sampled': Weighted(1.0, OBJECTIVES['sft'])})
    _, _, (terms, _) = value_and_grad(only, x, mixed)
    assert terms['sampled/nll'].count == batch.mask[[2, 3, 6, 7]].sum()

  def test_renamed_streams_of_a_mixed_batch_are_refused(self):
    """In alphabetical order `rl` would own the demonstrations, and `sft` the samples."""
    x, batch = examples.leaves(), examples.batch()
    both = objectives.WeightedSum(
      streams={'sft': Weighted(1.0, OBJECTIVES['sft']), 'rl': Weighted(1.0, OBJECTIVES['grpo'])}
    )
    assert loss_of(both, x, batch)[0] != 0  # without streams, any names are valid
    mixed = batch.replace(stream=np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int32))
    with pytest.raises(ValueError, match=r"\['rl', 'sft'\].*valid: \['demonstration', 'sampled'\]"):
      loss_of(both, x, mixed)

  def test_several_losses_may_share_rows_each_with_its_own_denominator(self):
    x, batch = examples.leaves(), examples.batch()
    mixed = batch.replace(stream=np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int32))
    given = functools.partial(row_choices.of_stream, kind='demonstration')
    constant = dataclasses.replace(
      OBJECTIVES['sft'], aggregation=functools.partial(aggregation.constant_length, length=3)
    )
    parts = {'mean': OBJECTIVES['sft'], 'demonstration': constant, 'all': OBJECTIVES['grpo']}
    both = objectives.WeightedSum(
      streams={name: Weighted(1.0, one) for name, one in parts.items()},
      rows={'mean': given, 'all': row_choices.all_rows},
    )
    value, grads, (terms, _) = value_and_grad(both, x, mixed)
    nll = -np.where(batch.mask, x['logp'], 0)[[0, 1, 4, 5]].sum()
    own = value_and_grad(OBJECTIVES['grpo'], x, batch)
    wanted = nll / batch.mask[[0, 1, 4, 5]].sum() + nll / (8 * 3) + own[0]
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    shared = 1 / batch.mask[[0, 1, 4, 5]].sum() + 1 / 24
    expected = own[1]['logp'] - np.where(batch.mask & (mixed.stream == 0)[:, None], shared, 0)
    np.testing.assert_allclose(grads['logp'], expected, rtol=1e-5, atol=1e-7)
    assert terms['mean/nll'].count == batch.mask[[0, 1, 4, 5]].sum()
    assert terms['demonstration/nll'].count == 24

  def test_a_choice_of_rows_is_refused_early_if_nothing_fits_it(self):
    sft = Weighted(1.0, OBJECTIVES['sft'])
    given = functools.partial(row_choices.of_stream, kind='sampled')
    with pytest.raises(ValueError, match=r"rows names \['x'\].*valid: \['sft'\]"):
      objectives.WeightedSum(streams={'sft': sft}, rows={'x': given})
    one = objectives.WeightedSum(streams={'sft': sft}, rows={'sft': given})
    assert one.requires == OBJECTIVES['sft'].requires | {'stream'}
    with pytest.raises(KeyError, match=r"rows\.sft: of_stream reads 'stream'"):
      loss_of(one, examples.leaves(), examples.batch())
    with pytest.raises(ValueError, match='unknown'):
      spec = part(row_choices.of_stream, kind='samples')
      registry.bind(spec, row_choices.TABLE)

  def test_schedules_multiply_weights(self):
    x, batch = examples.leaves(), examples.batch()
    both = objectives.WeightedSum(
      streams={'sft': Weighted(2.0, OBJECTIVES['sft'])},
      schedules={'sft': functools.partial(optim.linear, warmup=0, steps=10)},
    )
    start, half = (loss_of(both, x, batch, step=s)[0] for s in (0, 5))
    np.testing.assert_allclose(half, start / 2, rtol=1e-6)
    with pytest.raises(ValueError, match=r"schedules names \['x'\]"):
      objectives.WeightedSum(
        streams={'sft': Weighted(1.0, OBJECTIVES['sft'])}, schedules={'x': optim.constant}
      )

  def test_statistics_of_two_distillations_do_not_mix(self):
    x, batch = examples.leaves(), examples.batch()
    a, b = OBJECTIVES['distillation'], OBJECTIVES['forward_kl']
    both = objectives.WeightedSum(streams={'a': Weighted(1.0, a), 'b': Weighted(1.0, b)})
    wanted = value_and_grad(a, x, batch)[0] + value_and_grad(b, x, batch)[0]
    np.testing.assert_allclose(value_and_grad(both, x, batch)[0], wanted, rtol=1e-6)


def test_a_penalty_cannot_hide_the_surrogate_or_a_metric():
  x, batch = examples.leaves(), examples.batch()
  _, metrics = OBJECTIVES['reinforce'].apply(examples.outputs(x, {}), batch, (), step=0)
  assert {'entropy', 'sampler_kl', 'kept_positive'} <= metrics.keys()
  for name in ('policy', *metrics):
    with pytest.raises(ValueError, match=f"a penalty cannot be called '{name}'"):
      objectives.PolicyGradient(
        surrogate=surrogates.reinforce,
        aggregation=aggregation.token_mean,
        penalties={name: Weighted(1.0, penalties.k2)},
      )


def test_sampler_gap_is_reported():
  x, batch = examples.leaves(), examples.batch()
  _, metrics = OBJECTIVES['grpo'].apply(examples.outputs(x, {}), batch, (), step=0)
  gap = np.abs(batch.behavior_logp - x['logp'])[batch.mask]
  assert isinstance(metrics['sampler_max_gap'], Max)
  np.testing.assert_allclose(metrics['sampler_max_gap'].value(), gap.max(), rtol=1e-6)
  same = batch.replace(behavior_logp=x['logp'])
  _, metrics = OBJECTIVES['grpo'].apply(examples.outputs(x, {}), same, (), step=0)
  assert metrics['sampler_kl'].value() == 0


def test_weights_are_detached():
  """A weight made of live log-probs multiplies the loss and has no gradient of its own."""
  live = objectives.PolicyGradient(
    surrogate=surrogates.reinforce,
    aggregation=aggregation.token_mean,
    weights={'live': lambda logp: jnp.exp(logp)},
  )
  supervised = objectives.Supervised(
    aggregation=aggregation.token_mean, weights={'live': lambda logp: jnp.exp(logp)}
  )
  x, batch = examples.leaves(), examples.batch()
  weight = np.exp(x['logp']) * batch.mask / batch.mask.sum()
  _, grads, _ = value_and_grad(live, x, batch)
  np.testing.assert_allclose(grads['logp'], -weight * batch.advantages, rtol=1e-5)
  _, grads, _ = value_and_grad(supervised, x, batch)
  np.testing.assert_allclose(grads['logp'], -weight, rtol=1e-5)


def misspelt(log_ratio, advantage):
  return -log_ratio * advantage


def test_a_misspelt_array_is_an_error_that_names_slot_and_function():
  """The error lists the arrays there are and suggests the near one."""
  rest = dict(aggregation=aggregation.token_mean)
  score = dict(score=implicit_rewards.log_ratio_sum)
  reinforce = dict(surrogate=surrogates.reinforce, **rest)
  one = {'mine': misspelt}
  weighted = {'mine': Weighted(1.0, misspelt)}
  cases = {
    'surrogate': objectives.PolicyGradient(surrogate=misspelt, **rest),
    'weights.mine': objectives.PolicyGradient(weights=one, **reinforce),
    'penalties.mine': objectives.PolicyGradient(penalties=weighted, **reinforce),
    'selections.mine': objectives.PolicyGradient(selections=one, **reinforce),
    'probes.mine': objectives.PolicyGradient(probes=one, **reinforce),
    'score': objectives.Pairwise(score=misspelt, link=preference_losses.logistic),
    'loss': objectives.Pointwise(loss=lambda scores: scores, **score),
    'center': objectives.Regression(center=lambda residuals: residuals, **score),
  }
  x, batch = examples.leaves(), examples.batch()
  for slot, objective in cases.items():
    with pytest.raises(UnknownArray) as caught:
      loss_of(objective, x, batch)
    assert str(caught.value).startswith(f'{slot}: ')
    if objective.slots[slot] is misspelt and slot != 'score':
      wanted = "misspelt reads 'advantage', which is not here; did you mean 'advantages'? valid: ["
      assert wanted in str(caught.value)


def test_a_misspelt_array_of_a_statistic_is_refused_at_once():
  with pytest.raises(ValueError, match=r"stats.mine.*'logit'.*did you mean 'logits'"):
    objectives.PolicyGradient(
      surrogate=surrogates.reinforce,
      aggregation=aggregation.token_mean,
      stats={'mine': lambda logit, tokens: logit},
    )


def test_equal_scores_are_half_a_success():
  """Before the first update of DPO all margins are 0, up to the rounding of the log-probs."""
  x, batch = examples.leaves(), examples.batch()
  _, metrics = loss_of(OBJECTIVES['dpo'], x, batch.replace(reference_logp=x['logp']))[1]
  assert metrics['accuracy'].value() == 0.5
  assert metrics['margin'].value() == 0


def test_pairs_report_the_implicit_rewards_of_their_preferred_and_other_rows():
  x, batch = examples.leaves(), examples.batch()
  objective = OBJECTIVES['dpo']
  apply = lambda x: objective.apply(examples.outputs(x, {}), batch, (), step=0)[1]
  names = ('chosen_reward', 'rejected_reward', 'margin')
  metrics = jax.jit(lambda x: {name: apply(x)[name] for name in names})(x)
  logp, reference = (np.asarray(a, np.float64) for a in (x['logp'], batch.reference_logp))
  score = objective.beta * np.where(batch.mask, logp - reference, 0).sum(axis=1)
  pairs = [(0, 1), (3, 2), (7, 6)]  # preferred first; rows 4 and 5 have no tokens
  assert [int(batch.label[i]) for i, _ in pairs] == [1, 1, 1]
  for name, rows in zip(('chosen_reward', 'rejected_reward'), zip(*pairs)):
    np.testing.assert_allclose(metrics[name].value(), score[list(rows)].mean(), rtol=1e-5)
  gap = metrics['chosen_reward'].value() - metrics['rejected_reward'].value()
  np.testing.assert_allclose(gap, objective.beta * metrics['margin'].value(), rtol=1e-5)


def test_a_copy_with_other_knobs_is_valid():
  """Knobs that are completed when the objective is made are completed once."""
  objective = objectives.PolicyGradient(
    surrogate=surrogates.reinforce,
    aggregation=aggregation.token_mean,
    penalties={'kl': Weighted(1.0, divergences.forward_kl)},
    probes={'away': surrogates.clipped_away},
  )
  other = dataclasses.replace(objective, aggregation=aggregation.sequence_mean)
  assert other.stats.keys() == objective.stats.keys() == {'kl'}
  assert set(other.probes) == set(objective.probes) == {'probe/away'}
  assert other.requires == objective.requires
