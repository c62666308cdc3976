"""What the product costs beside its peers: ``python -m recipes.benchmark data_parallel``.

- ``interleaving``: bursts of steps of several competitors in turn, in the same processes;
- ``workloads``: what is trained;
- ``competitors``: ours, Lightning's strategies, and loops written by hand;
- ``agreement``: that competitors train the same, in float64;
- ``device``: what is measured, and how to wait for it;
- ``collectives`` and ``memory``: counted, not timed;
- ``export``: the memory of a converting process;
- ``start``: whole processes up to their first step;
- ``turns``: options of the timing, and whose time counts;
- ``overview``: all of them in one page;
- ``results``: lines, printed and kept as soon as they are measured; tables, a picture;
- ``data_parallel``, ``data_parallel_collectives``, ``tensor_parallel``, ``pipeline``, ``checkpoint``: what is measured;
- ``versions``, ``version_process`` and ``version_rank``: this checkout beside another one.
"""
