"""Parts of `bench_layers.py`."""
