"""Parts of `scripts/bench_layer_scoring.py`: the hosts, and the naive loop against prefix reuse."""
