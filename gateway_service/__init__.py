"""The front door: checks and tokenizes requests, picks workers, joins their streams, and answers."""
