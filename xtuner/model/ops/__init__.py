"""The arithmetic of training: forward and backward of what a block does, with what is kept between them chosen.

`elementwise` says in PyTorch what is computed, `kernels` does the same on GPUs in one pass over memory, `products`
multiplies with weights, `varlen` brings attention from other packages, `sums` adds weight gradients up, `functions`
puts them together for autograd.
"""
