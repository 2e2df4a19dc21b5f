"""Scorers of prefixes, which steer the decoding of a model that is not changed; one file each."""
