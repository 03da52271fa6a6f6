"""Scripts, run from the repository's root after `pip install -e .`: `python benchmarks/speed/bench_iteration.py`.

An editable install finds this package, so that scripts of one room can use another's; a wheel does not carry it.
"""
