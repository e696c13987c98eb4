"""Layers whose weights FSDP2 shards."""
