"""Transcriptions of the weights of supervised losses."""

import numpy as np

from polgrad.losses import weights

FUNCTIONS = {weights.probability: ({}, lambda a: np.exp(a.logp))}
