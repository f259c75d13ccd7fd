"""Shards on this machine and behind http, as stores (`cogcommon.store`); a cache on the disk.

Imports no other room.
"""
