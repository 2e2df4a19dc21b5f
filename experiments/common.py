"""What experiments share: the arithmetic task on a small model, and options of a config file."""

from collections.abc import Mapping

from ml_collections import ConfigDict

from polgrad import collect, models, objectives, optim, sharding
from polgrad.build import experiment, held_out, phase
from polgrad.data import sources, tokenizers
from polgrad.losses import aggregation
from polgrad.registry import part, weighted
from polgrad.rewards import verifiers

ALPHABET = '0123456789+='


def options(text: str, **defaults):
  """Reads `experiments/x.py:samples_per_prompt=8,smoke` into keyword values.

  Raises:
    ValueError: an option that the experiment does not have, or a value of another type.
  """
  values = dict(defaults)
  for item in filter(None, text.split(',')):
    name, _, value = item.partition('=')
    if name not in values:
      raise ValueError(f'unknown option {name!r}; valid: {sorted(values)}')
    kind = type(values[name])
    try:
      values[name] = value in ('', 'true', 'True', '1') if kind is bool else kind(value)
    except ValueError as error:
      raise ValueError(f'option {name}: expected {kind.__name__}, got {value!r}') from error
  return ConfigDict(values)


def tiny_model(**overrides) -> ConfigDict:
  """0.4 million parameters; learns two-digit addition in minutes on a CPU."""
  shape = dict(
    vocab_size=len(ALPHABET) + 2, num_layers=3, width=96, num_heads=4, num_kv_heads=2, head_dim=24,
    mlp_width=288, max_length=64,
  )  # fmt: skip
  return part(models.decoder, **{**shape, **overrides})


def addition(split: str = 'train') -> ConfigDict:
  """Two-digit addition; one problem in ten is held out."""
  return part(sources.arithmetic, digits=2, split=split)


def warm_start(*, steps: int = 180) -> ConfigDict:
  """Supervised learning of worked additions, stopped early: there is something to improve."""
  return part(
    phase,
    steps=steps,
    source=addition(),
    collect=part(collect.demonstrations, rows=64, length=12),
    objective=part(objectives.Supervised, aggregation=part(aggregation.token_mean)),
    optimizer=part(optim.adamw, learning_rate=1e-3),
  )


def preference_phase(
  *, objective: ConfigDict, steps: int, learning_rate: float = 1e-4, **overrides
) -> ConfigDict:
  """Right sums against wrong ones."""
  return part(
    phase,
    steps=steps,
    source=part(sources.wrong_digit_pairs, source=addition()),
    collect=part(collect.preferences, pairs=64, length=12),
    objective=objective,
    optimizer=part(optim.adamw, learning_rate=learning_rate),
    **overrides,
  )


def addition_phase(
  *,
  objective: ConfigDict,
  steps: int = 150,
  prompts: int = 32,
  samples_per_prompt: int = 8,
  learning_rate: float = 1e-4,
  rollouts: Mapping = {},
  **overrides,
) -> ConfigDict:
  """Samples additions and rewards exact answers."""
  settings = dict(
    steps=steps,
    source=addition(),
    collect=part(
      collect.rollouts,
      prompts=prompts,
      samples_per_prompt=samples_per_prompt,
      prompt_length=6,
      max_new_tokens=5,
      **rollouts,
    ),
    reward={'exact': weighted(1.0, part(verifiers.exact_match))},
    objective=objective,
    optimizer=part(optim.adamw, learning_rate=learning_rate),
  )
  return part(phase, **{**settings, **overrides})


def arithmetic_experiment(
  phases: Mapping[str, ConfigDict], *, smoke: bool = False, model: Mapping = {}, **overrides
) -> ConfigDict:
  """A run on two-digit addition; `smoke` shrinks it to two steps of a two-layer model."""
  settings = dict(
    tokenizer=part(tokenizers.characters, alphabet=ALPHABET),
    model=tiny_model(**model),
    mesh=part(sharding.make_mesh, data=-1),
    phases=dict(phases),
    order=tuple(phases),
    evaluation=part(
      held_out,
      source=addition('heldout'),
      reward={'exact': weighted(1.0, part(verifiers.exact_match))},
      problems=400,
      batch=400,
      prompt_length=6,
      max_new_tokens=5,
    ),
  )
  config = part(experiment, **{**settings, **overrides})
  return shrink(config) if smoke else config


def shrink(config: ConfigDict) -> ConfigDict:
  """Two steps a phase of a model that compiles quickly, on one device."""
  config.model.update(
    num_layers=2, width=32, num_heads=2, num_kv_heads=1, head_dim=16, mlp_width=64
  )
  config.mesh.data = 1
  config.evaluation.update(problems=8, batch=8)
  config.tensorboard = False
  for one in config.phases.values():
    one.steps = 2
    for rows in ('prompts', 'rows', 'pairs'):
      if rows in one.collect:
        one.collect[rows] = min(one.collect[rows], 4)
    for section in (one.collect, one.objective):  # both mean the rows of one prompt
      for rows in ('samples_per_prompt', 'rows_per_prompt'):
        if rows in section:
          section[rows] = min(section[rows], 4)
  return config
