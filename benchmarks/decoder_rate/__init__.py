"""Which learning rate decoders' coefficients want, over seeds and tasks, with LoRA beside them."""
