"""A tile-level model of the kernels in PyTorch: the executable specification, and slow.

`mask` applies the index arithmetic of ``csrc/kernels/core``, `softmax` is its online softmax, `forward` the schedule of
one forward kernel, `row_statistics` and `backward` those of the backward kernels. Products are computed in float32, for
float64 tensors in float64, also where the caller's torch.autocast would have them in 16 bits.
"""
