"""The prefill pool: workers that read prompts, draw the first token, and hand the KV blocks over."""
