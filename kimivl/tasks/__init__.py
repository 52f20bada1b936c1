"""Embedded tasks: small verifiable problems that write shards for all three stages."""
