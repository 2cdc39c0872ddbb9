"""A pipeline's requests that can be paused: each is a call that joins, pauses, and resumes here or on other ranks."""
