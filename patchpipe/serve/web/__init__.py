"""The service's routes over HTTP, with errors in OpenAI's shape."""
