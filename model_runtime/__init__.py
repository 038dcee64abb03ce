"""Models: configuration, weight files, tokenizer, sampler, and the decoder's forward pass over the kernel interface."""
