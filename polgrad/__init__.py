"""polgrad: pure post-training losses, a jitted sampler and a trainer you read top to bottom."""
