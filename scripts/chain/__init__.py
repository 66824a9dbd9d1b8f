"""Parts of scripts/bench_chain.py: hosts with random weights, measured phases, Torch-Pruning beside them, speed."""
