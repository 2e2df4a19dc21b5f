"""The model that a main works with: a checkpoint of a run, a run's beginning, or a bare folder.

    --config=... --workdir=RUN    the newest checkpoint of a run; --step=K is an earlier one
    --config=...                  the model of the configuration before training
    --model=FOLDER                a Hugging Face folder, without any run

`--model` means the configuration `bare(FOLDER)`, and its values can be changed in the same way:
`--config.model.dtype=bfloat16`, `--config.model.max_length=4096`, `--config.mesh.fsdp=4`.
"""

from absl import flags
from ml_collections import ConfigDict

from polgrad import cli, models, overrides, paths, sharding
from polgrad.build import TABLE, Experiment, build
from polgrad.data import tokenizers
from polgrad.evaluate import chosen_params, init_params, restore_params
from polgrad.models import hf
from polgrad.models.policy import Policy
from polgrad.registry import part
from polgrad.types import Params

MODEL = flags.DEFINE_string(
  'model', '', 'A Hugging Face folder, in place of the configuration and checkpoint of a run.'
)


def bare(folder: str) -> ConfigDict:
  """The configuration of a Hugging Face folder: its tokenizer and its model, and nothing to train."""
  return part(
    Experiment,
    tokenizer=part(tokenizers.huggingface, path=folder),
    model=part(models.pretrained, path=folder),
    mesh=part(sharding.make_mesh, data=-1),
    phases={},
    order=(),
  )


def start(argv: list[str]) -> None:
  """Like `cli.start`, for a main that takes --config or --model.

  It ends the process with exit code 2 if neither is given, or --model and a flag of a run.
  """
  with cli.refusals():
    if MODEL.value:
      names = ('config', 'workdir', 'checkpoints')
      given = [f'--{name}' for name in names if flags.FLAGS[name].value]
      given += [f'--{flag.name}' for flag in cli.chosen_of_a_run()]
      if given:
        raise ValueError(f'--model is a folder that no run made, so it cannot have {given}')
    elif flags.FLAGS['config'].value is None:
      raise ValueError(
        'name a model: --model=FOLDER, or --config=... with the --workdir of its run'
      )
  cli.start(argv, needed=['model' if MODEL.value else 'config'])


def config(*, reward_models: bool = False) -> ConfigDict:
  """The configuration that the flags choose, with the changes of the command line.

  Args:
    reward_models: the main can use a folder that holds a reward model.

  Raises:
    FileNotFoundError: --model is no folder.
    ValueError: a change that does not fit, see `overrides.apply`.
  """
  if not MODEL.value:
    return cli.config(TABLE)
  folder = str(paths.path(MODEL.value))
  if not paths.path(folder).is_dir():
    raise FileNotFoundError(f'--model: there is no folder {folder}')
  found = bare(folder)
  if reward_models and hf.is_reward_model(folder):
    found.model.value_head = True
  return overrides.apply(found, cli.CHANGES, TABLE)


def load(config: ConfigDict) -> tuple[Experiment, Params]:
  """The experiment of `config()`, and the parameters of its model that the flags choose.

  Raises:
    ValueError, TypeError, FileNotFoundError: see `build` and `evaluate.chosen_params`.
  """
  experiment = build(config)
  if MODEL.value:
    return experiment, init_params(experiment.policy, experiment.mesh, experiment.seed)
  return experiment, chosen_params(experiment)


def beside(name: str, experiment: Experiment, *, same: bool = True) -> tuple[Policy, Params]:
  """A second model on the devices of an experiment: a folder, or other parameters of the run.

  Args:
    name: a Hugging Face folder; with --workdir or --checkpoints also 'policy' or the name of an anchor.
    experiment: of the first model.
    same: whether the two vocabularies must have one size. Only logits need that: files of one tokenizer
      may have more rows of padding than others.

  Raises:
    FileNotFoundError: there is no such folder.
    ValueError: its vocabulary is not that of the experiment's model, or the run has no such anchor.
  """
  folder = paths.path(name)
  if not folder.is_dir() and (cli.WORKDIR.value or cli.CHECKPOINTS.value):
    found = restore_params(experiment, cli.checkpoint_folder(), cli.STEP.value, name)
    return experiment.policy, found
  if not folder.is_dir():
    raise FileNotFoundError(f'there is no folder {folder}')
  policy = models.pretrained(path=str(folder))
  sizes = policy.config.vocab_size, experiment.policy.config.vocab_size
  if (sizes[0] != sizes[1]) if same else sizes[0] < experiment.tokenizer.vocab_size:
    raise ValueError(
      f'the vocabulary of {folder} has {sizes[0]} tokens, that of the model {sizes[1]}; both must be '
      'of one tokenizer'
    )
  return policy, init_params(policy, experiment.mesh, experiment.seed)
