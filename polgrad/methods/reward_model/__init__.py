"""Reward models: methods that train a scalar head to judge completions."""
