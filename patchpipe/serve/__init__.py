"""The service: models of this machine behind OpenAI's API.

``work/`` has what is to be painted, ``steer/`` who is next and what is done about it, without a word of HTTP; ``web/``
has the routes; ``page/`` the playground that browsers get. Only ``web/`` and ``start.py`` import FastAPI.
"""
