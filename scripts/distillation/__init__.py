"""Parts of scripts/distill.py: flags to settings, training data, validation pictures, and what is written."""
