"""Parts of `scripts/bench_routing.py`."""
