"""Requests on their way through the service: tickets, what they ask for, the models that paint them."""
