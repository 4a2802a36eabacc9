"""What can be asked of a sampling or a training: options, ranges and help texts. Nothing here needs PyTorch."""
