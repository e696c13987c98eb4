"""Fused casts for eager mode on NVIDIA cards; needs Triton, which comes with torch for CUDA."""
