"""What `bench_tokens.py` measures: data, probes, candidates, rows of accuracy and speed, and the page made of them."""
