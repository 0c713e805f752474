"""The arithmetic of training: forward and backward of a block, with a choice of what is kept between them.

`elementwise` defines norms, rotation, SwiGLU and cross entropy in PyTorch; `elementwise_kernels` computes the same on
GPUs. `matmul` multiplies with weights, in fp8 with `fp8_kernels` and `cublaslt`. `attention_backends` wraps attention
of other packages, `gradient_sums` accumulates weight gradients, `autograd_functions` and `swiglu` combine all of them.
"""
