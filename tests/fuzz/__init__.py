"""Readers of foreign bytes, given bytes that nobody meant to write: `make fuzz`.

targets.py     what is read, and how an input for it is made
strategies.py  right inputs, changed a little: bytes, JSON, pickles
guard.py       what a reader may do: end with our own error, in seconds and megabytes, and write where it should
child.py       runs targets in a process of its own, which may die
__main__.py    starts the processes and reports what they find
"""
