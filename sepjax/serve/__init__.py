"""An HTTP server that speaks OpenAI's protocol, over slots whose memory never grows.

protocol       a request's JSON, checked, as frozen dataclasses
served         the model that answers, and how a conversation becomes token ids
worker         the one thread that steps the slots; queues between it and the HTTP side
conversations  rows that were kept, found again by the token ids that they have seen; state keeps them on disk
app            routes; responses writes what clients read
running        the process: socket, signals, draining
"""
