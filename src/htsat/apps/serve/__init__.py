"""``htsat serve``: tags and events over HTTP, live streams over WebSockets, and the page.

A request passes through these rooms, each of which may refuse it: ``run`` (connections), ``guard`` (who may enter, and
how many), ``uploads`` (the body, into temporary files), ``decoder`` (a process that nothing else depends on),
``engine`` and ``batcher`` (chunks, heard in turn), ``api`` (the answer). ``streams`` is the same for live sound.
"""
