"""Real faults against real runs, and the proof of what they cost: ``make chaos``.

- ``recorder``: inside each rank, notes every pair that is really trained on;
- ``history``: puts those notes together and counts what was lost, repeated and redone;
- ``driver``: what ``babelray train`` does, with the recorder in it;
- ``hosts``: several hosts on one machine, from network namespaces;
- ``scene``: a run under observation; ``faults``, ``host_faults``: what is done to it;
- ``table``: the results, for the terminal and for docs/reliability.md.
"""
