"""What a person looks at: the pages and sheets of a preview, and of cuts.

Imports source, video.
"""
