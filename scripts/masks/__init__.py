"""Parts of scripts/train_masks.py: flags to settings, prompts, processes, and what is written."""
