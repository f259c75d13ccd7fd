"""What is left to look at: the report page, charts, contact sheets, the model card.

Imports data, runs, settings.
"""
