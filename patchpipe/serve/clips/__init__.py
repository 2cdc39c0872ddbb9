"""Clips outlive the connection that asked for them, and the service: jobs in a database, their files in a folder."""
