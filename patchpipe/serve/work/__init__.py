"""Requests on their way through the service: tickets, the order they run in, the models that paint them."""
