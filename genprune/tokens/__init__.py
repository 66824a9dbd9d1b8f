"""Fewer tokens while a model runs: chosen by PageRank over the attention graph, by votes, or merged."""
