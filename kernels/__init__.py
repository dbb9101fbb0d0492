"""Triton kernels of resens_fast; installed, and imported, as ``resens_fast.kernels``.

A plan's levels, executed: product.py (the product inside every convolution), conv.py (a convolution of a block for
every step of a level), shortcut.py (what is added to it, or what is left of a deleted block), head.py (pool,
classify, count). The way back, along paths: signs.py (which ReLUs were open), transpose.py (a block's branch or
shortcut, transposed), normalise.py (powers of two kept apart), loss.py (where it starts, and the norms where it ends);
weights.py for training.

Around them, in plain Python: pack.py (parameters in the kernels' layout), schedule.py (levels to launches), tiles.py
(tile sizes), launch.py and backward.py (the calls), block.py (one block as differentiable operators).
resens_fast/engines/triton.py puts them together. For cards: specialisations.py (what is compiled, without one),
tune.py (faster tiles) and check.py (values and times on one).

All images are [image, y, x, channel] with the channels filled up to a multiple of 16 with zeros. The tables of steps
are int32 [steps, 3], their gates float32 [steps]. Many levels are many launches: two for each level and group of equal
blocks, and as many again for each piece that a level is cut into so that its intermediate images stay in L2. ResNet-110
takes a hundred for an intact pass and 700 for its single deletions, which the engine captures in CUDA graphs.
"""
