"""The training step, made fast and small: the transformer's blocks, run in our own way.

Each module is one lever that can be read alone and switched off:

* ``block``: what a CogVideoX block computes, as a function of its tensors;
* ``attention``: the attention kernels;
* ``keep``: what a block keeps for its backward pass, what it computes again;
* ``compiler``: the blocks compiled, and what it costs;
* ``trial``: what runs on the device, tried once;
* ``parking``: what is kept waits in host memory;
* ``streaming``: the frozen weights live in host memory and come one block ahead;
* ``host_training``: blocks are trained there, all or the last of them: weights, gradients and optimizer states;
* ``host_adam``: the optimizer that steps there;
* ``plan``: which of these a run needs, by arithmetic, from the memory there is;
* ``demand``: what a run would take under each strategy and setting, before it is loaded;
* ``seconds``: how long a step would take;
* ``engine``: puts them together, in a diffusers transformer.
"""
