"""Long footage to the parts of it that are clips: every picture looked at, cuts found, parts chosen between them.

Imports source, video.
"""
