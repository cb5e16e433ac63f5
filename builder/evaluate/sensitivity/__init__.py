"""What each linear layer loses when it is quantized, and which to exclude."""
