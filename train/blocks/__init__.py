"""The transformer's blocks, run in our own way; each file is one lever, read alone and switched off alone.

* ``block``: what a CogVideoX block computes, as a function of its tensors;
* ``attention``, ``flash4``: the attention kernels;
* ``qk_norm``, ``qk_kernels``: what stands before the attention, as one kernel each way;
* ``checkpointing``: what a block keeps for its backward pass, what it computes again;
* ``compiler``: the blocks compiled, and what it costs;
* ``trial``, ``verdicts``: what runs on the device, tried once, and what is remembered of it;
* ``load``, ``plan``: what a step works on, by arithmetic, and which levers it needs in the memory there is;
* ``known``: the layers that the blocks compute, so that no other is left out;
* ``engine``: puts them together, in a diffusers transformer.

Imports offload, settings.
"""
