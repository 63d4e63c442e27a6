"""Ask a running server what sounds in a recording, and then listen to it as a stream.

    htsat serve &
    python examples/client.py examples/street.ogg [http://127.0.0.1:8000]

A server that wants a token gets the one in HTSAT_TOKEN.
"""

import sys

import soundfile

import htsat

path, *rest = sys.argv[1:]
client = htsat.Client(*rest)

found = client.detect(path, posteriors=3)
print(f"{found.file}: {found.duration:.1f} s, heard by {found.model}")
for tag in found.tags:
    print(f"  {tag.label:<20} {tag.probability:.3f}")
for event in found.events:
    print(f"  {event.onset:7.2f} to {event.offset:7.2f}  {event.event_label}")
print("  framewise posteriors of", found.posteriors.labels, found.posteriors.values.shape)

print("as a stream:")
with soundfile.SoundFile(path) as recording, client.stream(recording.samplerate) as stream:
    for block in recording.blocks(recording.samplerate // 10, dtype="float32", always_2d=True):
        stream.send(block.mean(axis=1))
    stream.end()
    for message in stream:
        if message["type"] == "event" and message["state"] != "update":
            times = f"{message['onset']:7.2f} to {message['offset']:7.2f}"
            print(f"  {message['state']:<6} {times}  {message['event_label']}")
