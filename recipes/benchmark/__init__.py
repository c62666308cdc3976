"""What the product costs beside its peers: ``python -m recipes.benchmark data_parallel``.

- ``interleaving``: bursts of steps of several competitors in turn, in the same processes;
- ``workloads``: what is trained;
- ``competitors``: ours, Lightning's strategies, and loops written by hand;
- ``collectives`` and ``memory``: counted, not timed;
- ``export``: the memory of a converting process;
- ``start``: whole processes up to their first step;
- ``turns``: options of the timing, and whose time counts;
- ``results``: tables, JSON, a picture;
- ``data_parallel`` and ``tensor_parallel``: the measurements of those axes.
"""
