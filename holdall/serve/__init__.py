"""An HTTP server of OpenAI's API for one model, with sessions that can be named, saved and resumed.

    app.py        create_app: the endpoints
    server.py     what they do: a request to the engine's, its pieces to an answer
    schemas.py    what requests may say
    chat.py       messages to tokens
    answers.py    pieces to OpenAI's objects
    loop.py       the engine's thread, and streams of pieces for asyncio
    sessions.py   named sessions, in memory and in files
    metrics.py    Prometheus metrics under vLLM's names
    http.py       errors, the gate, event streams, clients that go away

It needs the extra `serve`.
"""
