"""Times google-tunix on a folder's workload: `python tunix_worker.py WORK grpo|dpo|sft`.

Tunix's own classes do the work: RLCluster with the vanilla rollout and GRPOLearner, DPOTrainer or
PeftTrainer, on its Qwen3. Set up for fairness: float32, no remat, a mesh of one device, a KV cache
of exactly prompt + new tokens, no micro-batches, checkpoints or metric backends, ids as arrays
where Tunix takes them. JAX is asynchronous: a part waits for its arrays, a step for its parameters.
Left as Tunix has them: the sampler's fixed seed, a prefill of all prompts x samples rows, an
entropy metric in each GRPO update, a drawn id 0 masked as padding, rope theta 1e6 whatever the
config says. KL is low_var_kl, the GRPO paper's estimator (Tunix's default is logp - ref_logp).
"""

import contextlib
import functools
import json
import pathlib
import resource
import sys
import time

import jax
import numpy as np
import optax
import tunix
from flax import nnx
from tunix.models.qwen3 import model as qwen3
from tunix.models.qwen3 import params as qwen3_params
from tunix.sft import peft_trainer, utils
from tunix.sft.dpo import dpo_trainer


class WordTokenizer:
  """The words `t0 t1 ...`; with a bos of None Tunix's sampler puts nothing before a prompt."""

  encode = staticmethod(lambda text, **_: [int(word[1:]) for word in text.split()])
  decode = staticmethod(lambda ids, **_: ' '.join(f't{i}' for i in ids))
  bos_id, eos_id, pad_id = (staticmethod(lambda i=i: i) for i in (None, 1024, 0))


class Clock:
  """Seconds of the parts and of whole steps, counted from start()."""

  def start(self):
    self.seconds = {}
    self.part_end = self.step_end = time.perf_counter()

  def add(self, part, begin):
    self.part_end = time.perf_counter()
    self.seconds.setdefault(part, []).append(self.part_end - begin)

  def wrap(self, owner, method, part, model=None, since_last=False):
    """Times a method until its result is there; with a model, a step until its parameters are."""
    inner = getattr(owner, method)

    def timed(*args, **kwargs):
      begin = self.part_end if since_last else time.perf_counter()
      result = inner(*args, **kwargs)
      jax.block_until_ready((result, model and nnx.state(model)))
      self.add(part, begin)
      if model:
        self.add('step', self.step_end)
        self.step_end = self.part_end
      return result

    setattr(owner, method, timed)


def load_model(folder, mesh):
  config = json.loads((folder / 'config.json').read_text())
  return qwen3_params.create_model_from_safe_tensors(
    str(folder),
    qwen3.ModelConfig(
      num_layers=config['num_hidden_layers'],
      vocab_size=config['vocab_size'],
      embed_dim=config['hidden_size'],
      hidden_dim=config['intermediate_size'],
      num_heads=config['num_attention_heads'],
      num_kv_heads=config['num_key_value_heads'],
      head_dim=config['head_dim'],
      norm_eps=config['rms_norm_eps'],
      rope_theta=1_000_000,
      use_tied_embedding=True,
      remat_config=qwen3.RematConfig.NONE,
    ),
    mesh,
    dtype=np.float32,
  )


def share_even(prompts, completions, **_):
  return [np.mean([i % 2 == 0 for i in WordTokenizer.encode(text)]) for text in completions]


def run_grpo(load, mesh, work, data, clock, optimizer, limits):
  length, new = data['prompt_length'], work['new_tokens']
  rollout = tunix.RolloutConfig(
    max_prompt_length=length,
    max_tokens_to_generate=new,
    kv_cache_size=length + new,
    temperature=1.0,
    top_p=1.0,
    top_k=None,
  )
  config = tunix.ClusterConfig(
    role_to_mesh=dict.fromkeys(tunix.Role, mesh),
    rollout_config=rollout,
    training_config=tunix.RLTrainingConfig(actor_optimizer=optimizer, **limits),
  )
  cluster = tunix.RLCluster(
    actor=load(), reference=load(), tokenizer=WordTokenizer(), cluster_config=config
  )
  learner = tunix.GRPOLearner(
    cluster,
    tunix.GRPOConfig(num_generations=work['samples'], beta=work['beta'], kl_loss_mode='low_var_kl'),
    share_even,
  )
  clock.wrap(cluster, 'generate', 'rollout')
  clock.wrap(cluster, 'get_ref_per_token_logps', 'reference')
  clock.wrap(cluster, 'update_actor', 'update', cluster.actor_trainer.model)
  prompts = np.array([WordTokenizer.decode(ids) for ids in data['prompts']])
  clock.start()
  learner.train([{'prompts': prompts}] * work['steps'])
  return cluster.actor_trainer, len(prompts) * work['samples'] * new


def run_supervised(trainer, batch, mesh, work, clock):
  clock.wrap(trainer, '_post_process_train_step', 'update', trainer.model, since_last=True)
  clock.start()
  with mesh:
    trainer.train([batch] * work['steps'])


def run_dpo(load, mesh, work, data, clock, optimizer, limits):
  config = tunix.DPOTrainingConfig(algorithm='dpo', beta=work['dpo_beta'], **limits)
  trainer = tunix.DPOTrainer(load(), load(), optimizer, config)
  rows, length = np.array([data['chosen'], data['rejected']], np.int32), data['prompt_length']
  ids = rows[0, :, :length], rows[0, :, length:], rows[1, :, length:]
  clock.wrap(trainer, '_prepare_inputs', 'reference')
  batch = dpo_trainer.TrainingInput(*(x for part in ids for x in (part, np.ones_like(part))))
  run_supervised(trainer, batch, mesh, work, clock)
  return trainer, rows[:, :, length:].size


def run_sft(load, mesh, work, data, clock, optimizer, limits):
  trainer = tunix.PeftTrainer(load(), optimizer, tunix.TrainingConfig(**limits))
  trainer.with_gen_model_input_fn(
    lambda x: {
      'input_tokens': x.input_tokens,
      'input_mask': x.input_mask,
      'positions': utils.build_positions_from_mask(x.input_mask),
      'attention_mask': utils.make_causal_attn_mask(x.input_mask),
    }
  )
  ids = np.array(data['sft'], np.int32)
  run_supervised(trainer, peft_trainer.TrainingInput(ids, ids > 0), mesh, work, clock)
  return trainer, ids[:, 1:].size


def main():
  folder, kind, clock = pathlib.Path(sys.argv[1]), sys.argv[2], Clock()
  data, work = (json.loads((folder / f'{name}.json').read_text()) for name in ('data', 'workload'))
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ('fsdp', 'tp'))
  adam = optax.adamw(work['learning_rate'], b1=0.9, b2=0.999, eps=1e-8, weight_decay=0)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), adam)
  limits = {'eval_every_n_steps': 10**9, 'max_steps': work['steps']}
  load = functools.partial(load_model, folder / 'model', mesh)
  with contextlib.redirect_stdout(sys.stderr):
    trainer, tokens = globals()[f'run_{kind}'](load, mesh, work, data, clock, optimizer, limits)
  loss, norm = (
    trainer.metrics_logger.get_metric_history(trainer.metrics_prefix, name, 'train')[0]
    for name in ('loss', 'grad_norm')
  )
  print(
    json.dumps(
      {
        'framework': 'tunix',
        'version': tunix.__version__,
        'kind': kind,
        'first': {part: values[0] for part, values in clock.seconds.items()},
        'seconds': {part: values[1:] for part, values in clock.seconds.items()},
        'tokens': tokens,
        'loss': float(loss),
        'grad_norm': float(norm),
        'peak_mib': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
      }
    )
  )


if __name__ == '__main__':
  main()
