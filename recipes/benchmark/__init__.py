"""What the product costs beside its peers: ``python -m recipes.benchmark data_parallel``.

- ``interleaving``: bursts of steps of several competitors in turn, in the same processes;
- ``workloads``: what is trained;
- ``competitors``: ours, Lightning's strategies, and loops written by hand;
- ``collectives`` and ``memory``: counted, not timed;
- ``start``: whole processes up to their first step;
- ``results``: tables, JSON, a picture;
- ``data_parallel``: the measurements of the data axes.
"""
