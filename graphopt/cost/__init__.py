"""What a node costs: FLOPs, bytes, seconds."""
