"""Parts of scripts/bench_checkpointing.py: pipelines with random weights, ways to backpropagate, memory and time."""
