"""An HTTP server of OpenAI's API for one model, with sessions that can be named, saved and resumed.

    app.py        create_app: the endpoints
    schemas.py    what requests may say
    answers.py    from the engine's pieces to OpenAI's objects
    chat.py       from messages to tokens
    loop.py       the engine's thread, and streams of pieces for asyncio
    sessions.py   named sessions, in memory and in files
    metrics.py    Prometheus metrics under vLLM's names

It needs `pip install 'holdall[serve]'`.
"""
