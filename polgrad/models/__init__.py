"""Models behind one seam, `Policy`; `TABLE` lists the factories."""

from typing import Annotated

from polgrad.models.hf import pretrained
from polgrad.models.lora import BASE, lora
from polgrad.models.policy import Policy
from polgrad.models.token_stats import token_stats
from polgrad.models.transformer import decoder
from polgrad.registry import table

TABLE = BASE | table('models', lora)
Part = Annotated[Policy, TABLE]

__all__ = ['TABLE', 'Part', 'Policy', 'decoder', 'lora', 'pretrained', 'token_stats']
