"""How KV blocks get from the prefill pool to the decode pool: codec, prefix keys, channels and leases."""
