"""A service over several nodes: Ray places replicas and tells when they die, and each replica decides for itself.

A replica is a group of devices of one node, with an engine for each model (``replica``). The service keeps the queue
and sends requests by their deadlines (``router``); what a replica comes to is one thread's matter (``slot``). Ray is
imported only here, in ``cluster``, and only when somebody asks for a fleet.
"""
