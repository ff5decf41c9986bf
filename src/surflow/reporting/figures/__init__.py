"""Figures, by what they show. matplotlib's object API, no pyplot state.

Every panel belongs to one run: the number under its title is that run's own, read from the
`record.json` in the folder of the file that is shown. PNG bytes depend on the input alone.
"""
