"""The decode pool: workers that write answers from slots on a fixed-capacity, quantized KV cache."""
