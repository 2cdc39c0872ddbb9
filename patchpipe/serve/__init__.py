"""The service: models of this machine behind OpenAI's API.

``work/`` has the requests, ``steer/`` decides which is next and carries that out, both without HTTP; ``web/`` has the
routes; ``page/`` the page that browsers get. Only ``web/`` and ``start.py`` import FastAPI.
"""
