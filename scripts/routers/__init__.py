"""Parts of scripts/train_router.py: flags to settings, what codes begin around, fine-tuning, and what is written."""
