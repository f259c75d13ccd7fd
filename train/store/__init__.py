"""Shards on this machine and behind http, as stores (`cogcommon.store`); threads that read; a cache on the disk.

Imports no other room.
"""
