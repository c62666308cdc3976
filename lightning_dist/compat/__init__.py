"""The one room that knows private names of other projects.

A function here is named for what it gives; its docstring says what for. :func:`~lightning_dist.compat.names.uses`
registers the private names that it stands on, and a test asks each of the installed releases.
"""
