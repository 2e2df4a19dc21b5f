"""Refuses settings of `Rollouts` that contradict each other."""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from polgrad.collect import beginnings, partial, sampled_first
from polgrad.collect.base import COMPARED
from polgrad.objectives.base import RESERVED
from polgrad.registry import inputs, unbound
from polgrad.sampling import behavior_policies

if TYPE_CHECKING:  # rollouts.py imports this module
  from polgrad.collect.rollouts import Rollouts


def check(settings: 'Rollouts') -> None:
  """Refuses contradictions.

  Raises:
    ValueError: names the settings and their valid values.
  """
  _check_environment(settings)
  _check_counts(settings)
  _check_memory(settings)
  _check_in_flight(settings)
  _check_sample_first(settings)
  _check_stats(settings.stats)


def _check_counts(settings: 'Rollouts') -> None:
  greedy = unbound(settings.baseline_policy) is behavior_policies.greedy
  if not greedy and not settings.baseline_samples:
    raise ValueError('Rollouts: baseline_policy draws nothing, because baseline_samples is 0')
  if settings.demonstrations not in (0, 1) or settings.preferences not in (0, 1):
    raise ValueError(
      f'Rollouts: demonstrations must be 0 or 1, got {settings.demonstrations}: a record has one '
      f'answer; and so must preferences, got {settings.preferences}: it has one pair'
    )
  unknown = {*settings.compare} - COMPARED
  if unknown or ('baseline_wins' in settings.compare and not settings.baseline_samples):
    raise ValueError(
      f"Rollouts: compare={settings.compare}: valid are 'wins' and, with baseline_samples, "
      "'baseline_wins'"
    )
  if settings.measures_entropy and 'old_entropy' not in settings.stats:
    raise ValueError(
      'Rollouts: token_temperature reads the entropies of the batch before, so stats must have '
      f'old_entropy (logit_stats.entropy), got {sorted(settings.stats)}'
    )
  if 'wins' in inputs(settings.choose) and 'wins' not in settings.compare:
    raise ValueError("Rollouts: choose reads wins, so 'wins' must be in compare")
  if settings.spans and (settings.begins or settings.has_environment):
    raise ValueError(
      'Rollouts: spans are parts of a completion that the policy wrote whole, in one turn; leave out '
      f'{"the beginning" if settings.begins else "the environment"}'
    )
  if settings.begins and (settings.demonstrations or settings.preferences or settings.others):
    raise ValueError('Rollouts: with a beginning, groups have no demonstrations and no preferences')
  if settings.traces and not settings.demonstrations:
    raise ValueError(f'Rollouts: traces={settings.traces!r} is not read without demonstrations=1')
  if settings.hints not in (0, 1) or (settings.hints and not settings.begins):
    raise ValueError(
      f'Rollouts: hints must be 0, or 1 with a beginning, got hints={settings.hints}; beginnings are '
      f'{sorted(beginnings.TABLE)}'
    )
  settings.rows_per_prompt  # refuses a choice of more rows than there are  # noqa: B018


def _check_environment(settings: 'Rollouts') -> None:
  """Refuses groups of episodes with rows that nothing answers."""
  if not settings.has_environment:
    return
  asked = {
    'demonstrations': settings.demonstrations,
    'preferences': settings.preferences,
    'others': settings.others,
    'beginning': settings.begins,
  }
  for knob, value in asked.items():
    if value:
      raise ValueError(
        f'Rollouts: {knob}={value} adds completions of the data to groups, which '
        'have no turns of an environment; leave it out, or the environment'
      )


def _check_memory(settings: 'Rollouts') -> None:
  """Refuses settings of `replay`, old runs and `overlap` that contradict each other."""
  fraction, replay = settings.replay_fraction, settings.replay
  if not 0 <= fraction <= 1 or bool(fraction) != bool(replay):
    raise ValueError(
      'Rollouts: replay_fraction must be 0 without replay, and in (0, 1] with it; '
      f'got replay={replay}, replay_fraction={fraction}'
    )
  if bool(settings.old_runs) != bool(settings.old_fraction):
    raise ValueError(
      'Rollouts: old_fraction must be 0 without old_runs, and in (0, 1] with them; '
      f'got old_runs={settings.old_runs}, old_fraction={settings.old_fraction}'
    )
  if settings.replay_keep == 'best' and (settings.lag or not settings.replay):
    raise ValueError(
      'Rollouts: replay_keep=best needs a number of batches in replay, and no lag, got '
      f'replay={replay}, lag={settings.lag}'
    )
  if settings.replay_keep == 'best' and 'rewards' not in inputs(settings.replay_priority):
    raise ValueError(
      'Rollouts: replay_keep=best needs a replay_priority that reads rewards, such as '
      'replay.contrast; by others all groups of a new batch are equally good'
    )
  if settings.corrects_replay and (not settings.replay or settings.old_runs):
    raise ValueError(
      'Rollouts: replay_correction weighs what is drawn from replay, so it needs replay, and no '
      f'old_runs; got replay={replay}, old_runs={settings.old_runs}'
    )
  if settings.corrects_replay and math.isinf(settings.replay_exponent):
    raise ValueError(
      'Rollouts: with replay_exponent=inf nothing is drawn, so there is no replay_correction'
    )
  if settings.overlap and not (settings.lag and settings.samples_apart):
    raise ValueError(
      f'{type(settings).__name__}: overlap samples beside an update on an earlier batch, so it needs '
      f'lag of at least 1, and Rollouts; got lag={settings.lag}'
    )
  if settings.overlap and settings.measures_entropy:
    raise ValueError(
      'Rollouts: token_temperature reads the entropies of the batch before, which overlap trains on '
      'at the same time; leave out one of them'
    )


def _check_in_flight(settings: 'Rollouts') -> None:
  """Refuses rows in flight beside what gives rows without versions, and chunks of others."""
  flying, name = settings.in_flight, type(settings).__name__
  if settings.chunk and not (flying and settings.overlap):
    raise ValueError(
      f'{name}: chunk={settings.chunk} interrupts sampling beside updates, so it needs overlap and '
      f'in_flight; got overlap={settings.overlap}, in_flight={flying}'
    )
  if settings.weights_every > 1 and not settings.chunk:
    raise ValueError(
      f'{name}: weights_every={settings.weights_every} needs a chunk of at least 1, with overlap and '
      'in_flight: without one all numbers are determined by the configuration, also after a run has '
      'resumed'
    )
  if not settings.refill and not settings.chunk:
    raise ValueError(
      f'{name}: refill=False needs a chunk of at least 1, with overlap and in_flight: caches of rows in '
      'flight are no part of a checkpoint, so without a chunk a run that has resumed would give other '
      'numbers'
    )
  if not flying:
    return
  if not settings.samples_apart:
    raise ValueError(f'{name}: in_flight={flying}: only Rollouts has rows in flight')
  if found := settings.asked(*partial.REFUSED):
    raise ValueError(
      f'{name}: in_flight={flying}: rows in flight are completions of one turn that the policy has '
      f'begun, so {found} cannot be set beside it'
    )
  if settings.lag and not settings.overlap:
    raise ValueError(
      f'{name}: in_flight={flying} with lag={settings.lag} needs overlap: the lag is then the number of '
      'batches that may wait to be used'
    )
  most = settings.prompts * (settings.batches_in_flight + 1)
  if not settings.prompts <= flying <= most:
    raise ValueError(
      f'{name}: in_flight={flying} must be at least prompts={settings.prompts}, and at most {most}: '
      f'prompts x (batches_in_flight={settings.batches_in_flight} + 1)'
    )


def _check_sample_first(settings: 'Rollouts') -> None:
  """Refuses settings that do not fit rows which the first step sampled."""
  first, most, name = settings.sample_first, settings.sample_first_most, type(settings).__name__
  if bool(first) != bool(most):
    raise ValueError(
      f'{name}: sample_first and sample_first_most must both be 0, or both at least 1; got '
      f'sample_first={first}, sample_first_most={most}'
    )
  if first and (found := settings.asked(*sampled_first.REFUSED)):
    raise ValueError(
      f'{name}: sample_first={first}: every step trains on rows that the first one sampled, so {found} '
      'cannot be set beside it'
    )


def _check_stats(stats: Mapping[str, Callable]) -> None:
  for name in stats:
    if name in RESERVED:
      raise ValueError(f'Rollouts: stats.{name}: the name is taken; taken are {sorted(RESERVED)}')
