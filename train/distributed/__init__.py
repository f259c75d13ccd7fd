"""The processes of a run: started, met, spread over by DDP or ZeRO, left together.

Imports offload, settings.
"""
