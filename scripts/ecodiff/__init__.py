"""Parts of scripts/bench_ecodiff.py: the bases, the candidates and their plans, the figures, the page."""
