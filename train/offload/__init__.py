"""Host memory as the GPU's second floor: activations, frozen blocks, and training itself.

Imports no other room.
"""
