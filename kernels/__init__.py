"""GPU kernels of the training step, each beside the plain PyTorch twin that states what it computes."""
