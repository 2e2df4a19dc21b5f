"""Sampling: who draws (`roles`), from which part of the distribution (`processors`), and the loop."""

from polgrad.sampling.sampler import make_sampler

__all__ = ['make_sampler']
