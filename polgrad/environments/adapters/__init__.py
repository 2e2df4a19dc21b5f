"""Environments of other packages.

| module | package | what of it |
|---|---|---|
| `textarena` | textarena | its text games, for one player, against an opponent, or in self-play |
| `verifiers` | verifiers, up to 0.2 | environments of tools and several turns, with data and rewards |
"""
