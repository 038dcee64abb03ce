"""Models: configuration, weight files, tokenizer, sampler, and the decoder over the kernel interface."""
