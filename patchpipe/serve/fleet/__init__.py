"""A service over several nodes: Ray places replicas and reports when they die; each replica decides for itself.

A replica is a group of devices of one node, with an engine for each model (``replica``). The service keeps the queue
and sends requests by their deadlines (``dispatcher``). One thread per replica starts it, and starts it again when it is
lost (``slot``). Ray is imported only here, in ``cluster``, and only when somebody asks for a fleet.
"""
