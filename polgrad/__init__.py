"""polgrad: pure post-training losses, a jitted sampler and a trainer you read top to bottom."""

__version__ = '0.2.0'
