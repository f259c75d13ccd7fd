"""From a video file to the pixels the VAE sees: container, times, decoding, colour, cut. The one user of PyAV.

Imports source.
"""
