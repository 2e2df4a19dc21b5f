"""Every method: it composes, survives JSON, says its source, gives a loss from arrays, and trains."""

import functools
import importlib
import inspect
import json
import pathlib
import re
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from polgrad import build, methods, metrics, phases, tasks, train
from polgrad.arrays import MODEL, shape_of
from polgrad.collect.base import HANDED_ON
from polgrad.methods.base import BUDGETS
from polgrad.options import from_text
from polgrad.registry import UnknownArray, part
from tests.runs import Run, method_of

row_sampler = importlib.import_module('polgrad.collect.row_sampler')
ROOT = pathlib.Path(__file__).parent.parent
EACH = pytest.mark.parametrize('name', methods.TABLE)
# Methods that are trained: with `grpo`, `dpo`, `sft` and `on_policy_distillation`, which mesh_test.py
# trains, they use every collector, class of objectives and kind of state. Losses have oracles elsewhere.
TRAINED = (
  *('ppo', 'dapo', 'hpt', 'props', 'harpg', 'oblr_po', 'epo', 'online_dpo', 'kto', 'mc_po'),
)
OFF_POLICY = {
  *('effective_sample_size', 'ratio_q01', 'ratio_q50', 'ratio_q99', 'sampler_kl'),
  *('sampler_max_gap', 'staleness'),
}


@EACH
def test_composes_and_survives_json(name):
  for text in ('', 'smoke'):
    config = Run(name).get_config(text)
    data = json.loads(config.to_json())
    assert build.build(data).order == config.order
    assert json.loads(config.to_json()) == data


@EACH
def test_says_its_source_and_how_sure_we_are(name):
  function = methods.TABLE[name]
  doc = inspect.getdoc(function)
  assert re.search(r'arXiv:\d{4}\.\d{4,5}|standard|Williams 1992', doc.splitlines()[0])
  assert re.search(r'Confidence: .*(CODE|PAPER|DERIVED|MEMORY)', doc)
  for knob in inspect.signature(function).parameters:
    assert knob in BUDGETS or re.search(rf'^\s*(\w+, )*{knob}\b.*:', doc, re.MULTILINE), knob
  lines, _ = inspect.getsourcelines(function)
  assert len(lines) - len(function.__doc__.splitlines()) <= 50


def arrays_of(method: methods.Method, seed: int = 0) -> dict[str, np.ndarray]:
  """Random values of everything that the method reads: two groups of four rows (or four of two) of
  five tokens."""
  size = method.bound()[1].rows_per_prompt
  group = size if size in (2, 6) else 4
  random = np.random.default_rng(seed)
  shapes = {
    'B T': (8, 5),
    'B': (8,),
    'B n': (8, 3),
    'B G': (8, group),
    'B K': (8, 2),
    'B Tk': (8, 10),
    '... V': (8, 5, 7),
    '... D': (8, 5, 4),
    '2': (2,),
  }
  # Near each other, so that no ratio is clipped; in one order in every process.
  shape = lambda name: shapes.get(shape_of(name), (8, 5))
  found = {name: 0.1 * random.random(shape(name)) for name in sorted(method.reads)}
  found = {name: -x if name.endswith('logp') else x for name, x in found.items()}
  if 'label' in found:
    found['label'] = np.tile([0.9, 0.1], 4)
  if 'rewards' in found:
    found['rewards'] = np.tile([1.0, 0.0], 4)
  if 'group_ids' in found:
    found['group_ids'] = np.arange(8) // group
  if 'shown_label' in found:
    found['label'] = np.tile([1.0, 0.0], 4)
    found['shown_label'] = np.array([-1.0, -1, 0, 0, 1, 1, -1, -1])
  if 'stream' in found:
    found['stream'] = np.tile([0, 0, 1, 1], 2)
  for name in {'step_ids', 'span_ids'} & found.keys():
    found[name] = np.tile([0, 0, 1, 1, 2], (8, 1))
  if 'tokens' in found:
    found['tokens'] = np.arange(40).reshape(8, 5) % 3
  for name in {'early_tokens', 'mixed_tokens'} & found.keys():
    found[name] = np.arange(80).reshape(8, 10) % 3
  if 'teacher_top_ids' in found:  # two different tokens at each place
    found['teacher_top_ids'] = np.arange(80).reshape(8, 10) % 7
    found['teacher_top_log_probs'] -= 2
  if 'opponent' in found:
    found['opponent'] = np.tile([0.0, 0.0, 0.0, 1.0], 2)
  return found


@EACH
def test_gives_a_loss_and_its_gradient_from_arrays(name):
  method = method_of(name)
  arrays = arrays_of(method)
  names = (*MODEL, 'logits')
  live = {k: arrays.pop(k) for k in names if k in arrays}
  mask = np.ones((8, 5), bool)

  def loss(live):
    return method.loss(mask=mask, **live, **arrays)[0]

  value, gradient = jax.value_and_grad(loss)(jax.tree.map(jnp.asarray, live))
  assert np.isfinite(value)
  assert any(np.abs(g).max() > 0 for g in jax.tree.leaves(gradient))


def test_the_loss_of_a_method_is_that_of_its_credit_and_objective():
  """DAPO by hand: three rows, of which the first group has the rewards 1 and 0."""
  logp = np.log([[0.5, 0.2], [0.5, 0.4], [0.3, 0.3], [0.2, 0.1]])
  old = np.log([[0.4, 0.2], [0.5, 0.5], [0.3, 0.3], [0.2, 0.1]])
  mask = np.array([[1, 1], [1, 0], [1, 1], [1, 1]], bool)
  rewards, groups = np.array([1.0, 0, 2, 2]), np.array([0, 0, 1, 1])
  std = np.sqrt(0.5)  # of 1 and 0, unbiased
  advantages = np.array([0.5, -0.5, 0, 0]) / (std + 1e-6)
  ratio = np.exp(logp - old)
  clipped = np.clip(ratio, 0.8, 1.28)
  token = -np.minimum(ratio * advantages[:, None], clipped * advantages[:, None])
  expected = (token * mask).sum() / mask.sum()
  arrays = dict(logp=logp, behavior_logp=old, rewards=rewards, mask=mask, group_ids=groups)
  loss, found = methods.dapo(max_new_tokens=2).loss(**arrays)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  assert 'sampler_kl' in found


def test_missing_and_misspelt_arrays_are_named():
  method = methods.grpo()
  with pytest.raises(UnknownArray, match=r"'rewards'.*this method reads"):
    method.loss(mask=np.ones((2, 3), bool), logp=np.zeros((2, 3)))
  with pytest.raises(UnknownArray, match="no method reads 'reward'; did you mean 'rewards'"):
    method.loss(mask=np.ones((2, 3), bool), logp=np.zeros((2, 3)), reward=np.zeros(2))
  with pytest.raises(UnknownArray, match=r'proximal_logp.* \(or behavior_logp in its place\)'):
    method.loss(mask=np.ones((2, 3), bool), logp=np.zeros((2, 3)), rewards=np.zeros(2))


def gspo_arrays(**arrays) -> dict:
  given = dict(mask=np.ones((2, 3), bool), logp=-np.ones((2, 3)), behavior_logp=-np.ones((2, 3)))
  return given | dict(rewards=np.array([1.0, 0.0]), group_ids=np.array([0, 0])) | arrays


@pytest.mark.parametrize(
  ('name', 'value'),
  [
    ('rewards', np.zeros((2, 1))),
    ('rewards', np.zeros(3)),
    ('rewards', 1.0),
    ('logp', np.zeros((2, 4))),
    ('behavior_logp', np.zeros(2)),
    ('mask', np.ones(3, bool)),
    ('mask', np.zeros((0, 3), bool)),
  ],
)
def test_an_array_of_another_shape_is_named(name, value):
  with pytest.raises(
    ValueError, match=f'{name} has shape {re.escape(str(np.shape(value)))}; expected'
  ):
    methods.gspo().loss(**gspo_arrays(**{name: value}))


def test_other_types_give_the_same_loss():
  method = methods.gspo()
  loss, _ = method.loss(**gspo_arrays())
  for other in (
    dict(mask=np.ones((2, 3), int)),
    dict(rewards=np.array([True, False])),
    dict(rewards=np.array([1, 0])),
    dict(behavior_logp=-np.ones((2, 3), int)),
    dict(reference_logp=np.zeros((2, 3)), values=np.zeros((2, 3))),  # read by other methods
  ):
    assert method.loss(**gspo_arrays(**other))[0] == loss
  ours = np.array([0.7, -0.7])
  rows, tokens = (
    method.loss(**gspo_arrays(advantages=a))[0] for a in (ours, np.tile(ours[:, None], 3))
  )
  assert rows == tokens
  with pytest.raises(ValueError, match=r'mask is float.*for example mask > 0'):
    method.loss(**gspo_arrays(mask=np.ones((2, 3))))


@pytest.mark.parametrize(
  ('text', 'words'),
  [
    ('task=addition,model=tiny', ['method=... is missing', 'dapo']),
    ('method=dapoo,task=addition,model=tiny', ["unknown 'dapoo'; did you mean 'dapo'"]),
    ('method=dapo,task=chain_sums,model=tiny', ["unknown 'chain_sums'; did you mean 'chain_sum'"]),
    ('method=dapo,task=addition,model=tinny', ["unknown 'tinny'; did you mean 'tiny'"]),
    ('method=dapo,task=addition,model=tiny,step=3', ["unknown option 'step'", "'steps'"]),
    ('method=dapo,task=addition,model=tiny,steps=x', ["option steps: expected int, got 'x'"]),
    (
      'method=dpo,task=countdown,model=tiny',
      ['needs pairs', 'addition, choices, chain_sum, and jsonl'],
    ),
    (
      'method=dno,iterations=0,task=addition,model=tiny',
      ['method.iterations: expected a number at least 1'],
    ),
    ('method=on_policy_distillation,task=addition,model=tiny,warm_start=0', ['teacher=FOLDER']),
    ('method=sft,task=chain_sum,model=hf', ['model=hf needs path=FOLDER']),
  ],
)
def test_what_does_not_fit_is_refused_with_what_does(text, words):
  with pytest.raises(ValueError) as error:
    from_text(text)
  for word in words:
    assert word in str(error.value)


def test_options_belong_to_the_method_the_task_or_the_run():
  config = from_text(
    'method=dapo,task=countdown,model=tiny,max_numbers=4,eps_high=0.3,rows=16,steps=7'
  )
  phase = config.phases.train
  assert phase.steps == 7 and phase.collect.prompts == 2
  assert phase.objective.surrogate.eps_high == 0.3
  assert phase.source.options.max_numbers == 4
  knobs = {n: set(inspect.signature(f).parameters) - set(BUDGETS) for n, f in methods.TABLE.items()}
  own = {f.name for f in tasks.Task.__dataclass_fields__.values()}
  own |= {p for f in tasks.TABLE.values() for p in inspect.signature(f).parameters}
  assert not {n: k & own for n, k in knobs.items() if k & own}


@pytest.fixture(scope='module')
def made():
  """Samplers by model and settings, parameters by model: making them takes longer than smoke steps."""
  return {}


@pytest.fixture
def shared(made, monkeypatch):
  draws_of, init_params = row_sampler.draws_of, phases.init_params

  def draws(settings, context, **sampler):
    handed = {name: getattr(settings, name, None) for name in HANDED_ON} | sampler
    key = context.policy.config, tuple(context.frozen), repr(sorted(handed.items(), key=str))
    if key not in made:
      made[key] = draws_of(settings, context, **sampler)
    return made[key]

  def params(policy, mesh, seed):
    key = policy.config, mesh, seed
    if key not in made:
      made[key] = init_params(policy, mesh, seed)
    return jax.tree.map(jnp.copy, made[key])  # an update gives its arguments away

  monkeypatch.setattr(row_sampler, 'draws_of', draws)
  monkeypatch.setattr(phases, 'init_params', params)


@pytest.mark.parametrize('name', TRAINED)
def test_trains_two_smoke_steps(name, tmp_path, undrawn, shared):
  config = Run(name).get_config('smoke')
  with config.unlocked():
    config.evaluation = part(build.Never)
    config.phases = {'train': config.phases.train}
    config.order = ('train',)
  state = train.run(config, str(tmp_path))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(state.params)))
  rows = metrics.read(str(tmp_path / 'metrics.jsonl'))
  assert [r['skipped'] for r in rows] == [0.0] * 2
  for row in rows:
    assert np.isfinite(row['loss'])
    if 'reward' in row:
      names = {key.split('/')[-1] for key in row}
      assert names >= (OFF_POLICY if row['tokens_per_second'] else {'staleness', 'sampler_max_gap'})
      assert 0 <= row.get('effective_sample_size', 1) <= 1 + 1e-6
      assert row['tokens_per_second'] or 'accuracy' not in row  # all pairs were ties


def other(value):
  """Another value of an option that is a number or a choice of two."""
  if isinstance(value, bool):
    return not value
  if isinstance(value, int):
    return value + 1
  return 0.87 * value + 0.0031 if isinstance(value, float) else None


def choices_of(option: inspect.Parameter) -> tuple:
  """The values of an option that chooses; () for all others."""
  if typing.get_origin(option.annotation) is typing.Literal:
    return typing.get_args(option.annotation)
  return (False, True) if isinstance(option.default, bool) else ()


def test_an_option_that_only_another_choice_reads_is_refused():
  """Of every method: no option is read by one choice of another option and ignored by the next."""
  numbers = dict(max_new_tokens=8, steps=1000, candidates=4, samples_per_prompt=4)
  budgets = numbers | dict(learning_rate=1e-4, supervised_rate=1e-4)
  found = {}
  for name, function in methods.TABLE.items():
    options = inspect.signature(function).parameters
    filled = {k: x for k, x in budgets.items() if k in options}
    values = {k: other(option.default) for k, option in options.items() if k not in BUDGETS}
    for key, option in options.items():
      for knob in [
        k for k, x in values.items() if x is not None and k != key and choices_of(option)
      ]:
        change = {knob: values[knob]}
        effects = {effect(function, filled | {key: c}, change) for c in choices_of(option)}
        found[name, key, knob] = effects
  silent = [which for which, effects in found.items() if {'read', 'ignored'} <= effects]
  assert not silent, 'name the options of each choice with `methods.base.choice`'
  refused = {name for (name, _, _), effects in found.items() if 'refused' in effects}
  assert {'hpt', 'luffy', 'uft', 'tdpo'} <= refused


@functools.cache
def written(function, *knobs) -> str:
  """The method as text, or '' if the function refuses these options."""
  try:
    return json.dumps(vars(function(**dict(knobs))), default=plainly)
  except ValueError:
    return ''


def plainly(x):
  """What is in a configuration, or in a collector with some of its settings."""
  if isinstance(x, ConfigDict):
    return x.to_dict()
  return [repr(x.func), x.keywords] if isinstance(x, functools.partial) else repr(x)


def effect(function, fixed, changed) -> str:
  """What an option does to a method."""
  plain, other = (written(function, *x.items()) for x in (fixed, fixed | changed))
  return 'refused' if not other else 'ignored' if plain == other else 'read'


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('luffy,shape=power,gamma=0.3', "gamma is only read with shape='ratio', but shape='power', wh"),
    ('luffy,exponent=0.3', "exponent is only read with shape='power', but shape='ratio', which reads"),
    ('uft,reveal=stage,low=0.1', r"low is only read with reveal='cosine', but .* reads \['hinted'\]"),
    ('hpt,soft,limit=1', 'limit is only read with soft=False, but soft=True'),
    ('tdpo,alpha=0.3', 'alpha is only read with second=True, but second=False, which reads no option'),
  ],
)  # fmt: skip
def test_an_option_of_another_choice_is_named(text, message):
  with pytest.raises(ValueError, match=message):
    from_text(f'method={text},task=addition,model=tiny')
