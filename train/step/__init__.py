"""The training step, made fast and small: the transformer's blocks, run in our own way.

Each module is one lever that can be read alone and switched off:

* ``block``: what a CogVideoX block computes, as a function of its tensors;
* ``attention``: which attention kernel, tried once on the device;
* ``keep``: what a block keeps for its backward pass, what it computes again;
* ``compiler``: whether there is a compiler, and what it costs;
* ``parking``: what is kept waits in host memory;
* ``streaming``: the frozen weights live in host memory and come one block ahead;
* ``plan``: which of these a run needs, by arithmetic, from the memory there is;
* ``engine``: puts them together, in a diffusers transformer.
"""
