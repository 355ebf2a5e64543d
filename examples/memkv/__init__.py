"""A key-value server that Redis clients talk to, and that keeps to a budget of memory.

``python -m examples.memkv --port P --dir D --limit SIZE [--policy noeviction|allkeys-lru]``

requests and resp are the protocol, connection is one client, server what all share; commands is how a command is
described, and strings, keys, admin and transactions are the commands; store is the data, behind one narrow face;
persistence and rdb are the dump; config and info are what CONFIG and INFO say.
"""
