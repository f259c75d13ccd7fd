"""Still pictures read, and H.264 videos written. (Reading clips is prep's alone.)

Imports files.
"""
