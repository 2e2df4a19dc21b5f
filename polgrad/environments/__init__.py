"""Environments: what answers the turns of the policy, such as a tool, a game or a teacher."""

from polgrad.environments.base import Environment, Replies, Step

__all__ = ['Environment', 'Replies', 'Step']
