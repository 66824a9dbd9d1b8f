"""Running a stock pipeline's denoiser: what it is called with, and noised inputs with their targets."""
