"""The lazy latent: a tensor whose patches are promises, what was done to it, and which operations keep it cut.

The pipeline's own loop works on it as on any tensor. Knows nothing of ranks, models or requests.
"""
