"""Keys and values that outlive a patch: the store, masks of keys, and the forecast of stale rows."""
