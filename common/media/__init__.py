"""Still pictures read, and H.264 videos written, and read back. (Reading clips is prep's alone.)

Imports files.
"""
