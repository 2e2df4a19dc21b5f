"""An engine for tests: a Llama in NumPy behind the protocol of external engines.

    python tiny_engine.py TROUBLE FD LIFELINE FOLDER

TROUBLE is '' or FILE:KIND: while there is a file FILE, the next rollout removes it and fails so.
"""

import functools
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np

WORKER = pathlib.Path(__file__).parents[2] / 'polgrad' / 'sampling' / 'vllm_worker.py'


def read(folder):
  """The tensors of a folder by name, f64."""
  data = (pathlib.Path(folder) / 'model.safetensors').read_bytes()
  size = int.from_bytes(data[:8], 'little')
  header = json.loads(data[8 : 8 + size])
  del header['__metadata__']
  found = {}
  for name, entry in header.items():
    begin, end = (8 + size + i for i in entry['data_offsets'])
    found[name] = np.frombuffer(data[begin:end], np.float32).reshape(entry['shape']).astype(float)
  return found


def norm(x, scale, epsilon):
  return scale * x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon)


def rotated(x, theta):
  """x [T, heads, size], each pair half a head apart turned by its position."""
  half = x.shape[-1] // 2
  angle = np.arange(len(x))[:, None, None] / theta ** (np.arange(half) / half)
  one, two = x[..., :half], x[..., half:]
  cos, sin = np.cos(angle), np.sin(angle)
  return np.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1)


def softmax(x):
  e = np.exp(x - x.max(axis=-1, keepdims=True))
  return e / e.sum(axis=-1, keepdims=True)


def of_layer(w, layer, name):
  return w[f'model.layers.{layer}.{name}.weight']


def last_logits(w, c, ids):
  """Logits [V] behind the ids of a row."""
  size, epsilon = c['head_dim'], c['rms_norm_eps']
  x = w['model.embed_tokens.weight'][ids]
  seen = np.tril(np.ones((len(ids), len(ids)), bool))
  for layer in range(c['num_hidden_layers']):
    of = functools.partial(of_layer, w, layer)
    h = norm(x, of('input_layernorm'), epsilon)
    q, k, v = ((h @ of(f'self_attn.{name}_proj').T).reshape(len(ids), -1, size) for name in 'qkv')
    q, k = (rotated(part, c['rope_theta']) for part in (q, k))
    k, v = (np.repeat(part, q.shape[1] // part.shape[1], axis=1) for part in (k, v))
    scores = np.einsum('qhd,khd->hqk', q, k) / np.sqrt(size)
    probs = softmax(np.where(seen, scores, -np.inf))
    mixed = np.einsum('hqk,khd->qhd', probs, v).reshape(len(ids), -1)
    x = x + mixed @ of('self_attn.o_proj').T
    h = norm(x, of('post_attention_layernorm'), epsilon)
    gate, up = h @ of('mlp.gate_proj').T, h @ of('mlp.up_proj').T
    x = x + (gate / (1 + np.exp(-gate)) * up) @ of('mlp.down_proj').T
  out = w.get('lm_head.weight', w['model.embed_tokens.weight'])
  return norm(x, w['model.norm.weight'], epsilon)[-1] @ out.T


def kept(logits, top_k, top_p):
  """The probabilities [V] of sampling."""
  order = np.argsort(-logits, kind='stable')
  if top_k:
    logits = np.where(logits >= logits[order[top_k - 1]], logits, -np.inf)
  probs = softmax(logits)
  before = np.cumsum(probs[order]) - probs[order]
  probs[order[before >= top_p]] = 0
  return probs / probs.sum()


class Tiny:
  """The engine."""

  def __init__(self, trouble, link):
    self.link = link
    file, _, self.kind = trouble.rpartition(':')
    self.file = pathlib.Path(file) if file else None

  def start(self, folder, settings):
    if settings.get('max_length', 0) > 64:
      raise ValueError(f'max_length {settings["max_length"]} is more than 64')
    self.config = json.loads((pathlib.Path(folder) / 'config.json').read_text())
    print('started')
    return {'engine': f'tiny, {self.weights(folder)["tensors"]} tensors'}

  def weights(self, folder):
    self.tensors = read(folder)
    return {'tensors': len(self.tensors) - (self.kind == 'lost')}

  def sample(self, prompts, seeds, settings):
    rows = [
      self.row(ids, seed, **settings)
      for ids, own in zip(prompts, seeds, strict=True)
      for seed in own
    ]
    if self.file and self.file.exists():
      self.file.unlink()
      rows = self.fail(rows)
    return {'rows': rows}

  def row(self, ids, seed, *, max_tokens, temperature, top_k, top_p, stop_token_ids):
    random, drawn, logp = np.random.default_rng(seed), [], []
    while len(drawn) < max_tokens and not (drawn and drawn[-1] in stop_token_ids):
      logits = last_logits(self.tensors, self.config, ids + drawn)
      probs = kept(logits / (temperature or 1), top_k if temperature else 1, top_p)
      drawn.append(int(random.choice(len(probs), p=probs)))
      logp.append(float(np.log(probs[drawn[-1]])))
    return {'tokens': drawn, 'logp': logp}

  def fail(self, rows):
    """Does what the engine is made to do wrong."""
    first = rows[0]
    match self.kind:
      case 'dies':
        print('out of memory, as it were', flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
      case 'hangs':
        # A child holds nothing that the trainer waits for, and is killed too.
        child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
        (self.file.parent / 'child').write_text(str(child.pid))
        time.sleep(600)
      case 'garbage':
        os.write(self.link, (6).to_bytes(8, 'little') + b'{1,,,}')
      case 'endless':
        os.write(self.link, (2**60).to_bytes(8, 'little'))
      case 'fewer':
        return rows[1:]
      case 'other id':
        first['tokens'][0] = 10**6
      case 'no number':
        first['logp'][0] = float('nan')
      case 'cut off':
        first['tokens'], first['logp'] = [0], [-1.0]
      case 'raises':
        raise MemoryError('no room for keys and values')
    return rows


if __name__ == '__main__':
  spec = importlib.util.spec_from_file_location('vllm_worker', WORKER)
  worker = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(worker)
  trouble, link, lifeline, folder = sys.argv[1:]
  worker.serve(Tiny(trouble, int(link)), int(link), int(lifeline), folder)
