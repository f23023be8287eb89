"""The kernels in Pallas, lowered through Triton for NVIDIA GPUs and interpreted elsewhere."""
