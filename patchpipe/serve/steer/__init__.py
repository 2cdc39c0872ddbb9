"""Which request has which devices next, decided by ``patchpipe.scheduling`` and carried out with engines' tickets.

``parts`` says how far each picture and clip is, ``costs`` what they take, ``deciding`` asks the policy, ``runs`` has
engines do it, ``conductor`` is the one thread in which all of that meets.
"""
