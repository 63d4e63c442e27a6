"""``htsat listen``: a box that listens for weeks.

``sources`` brings sound from wherever it comes, ``outputs`` takes what was heard to wherever it goes, ``run`` is
between them: it keeps the time line, on which every second is either heard or a counted gap.
"""
