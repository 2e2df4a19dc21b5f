"""Sampling: who draws (`roles`), from which part of the distribution (`processors`), and the loop."""

from polgrad.sampling.sampler import completion_lengths, make_sampler

__all__ = ['completion_lengths', 'make_sampler']
