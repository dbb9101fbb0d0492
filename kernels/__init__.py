"""Triton kernels of resens_fast; installed, and imported, as ``resens_fast.kernels``.

A plan's levels, executed: product.py (the product inside every convolution), conv.py (a convolution of a block for
every step of a level), shortcut.py (what is added to it, or what is left of a deleted block), head.py (pool,
classify, count). The way back, along paths: signs.py (which ReLUs were open), transpose.py (a block's branch or
shortcut, transposed), loss.py (where it starts, and the norms where it ends); weights.py for training.

Around them, in plain Python: pack.py (parameters in the kernels' layout), schedule.py (levels to launches), tiles.py
(tile sizes), launch.py and backward.py (the calls), block.py (one block as differentiable operators).
resens_fast/engines/triton.py puts them together.

All images are [image, y, x, channel] with the channels filled up to a multiple of 16 with zeros. All tables are int32
[steps, 3]. Many levels are many launches: two for each level and group of equal blocks, so a network of 54 blocks takes
some hundred, which the engine captures in a CUDA graph.
"""
