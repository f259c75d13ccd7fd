"""From pixels to latents: the VAE's encoder, ours or diffusers', and the time that it takes of the GPU.

Imports settings.
"""
