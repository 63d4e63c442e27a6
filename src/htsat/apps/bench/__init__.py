"""``htsat bench``: how large, fast and hungry our models are, beside others, in one run.

Whatever is measured lives in a process of its own, so that its memory and threads are its own; the processes take
turns, A B C A B C, so that whatever else the machine does meets all of them. Ratios are the figures to read.
"""
