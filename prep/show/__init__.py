"""What a person sees: progress on a terminal, and the pages and sheets of a preview.

Imports processes, source, video.
"""
