"""What `scripts/train_vit.py` is made of: Fashion-MNIST, a small timm ViT, and its training."""
