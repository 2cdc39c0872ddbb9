"""The lazy latent: a tensor whose patches come later, the operations recorded on it, and which of them run per patch.

The pipeline's own loop works on it as on any tensor. Knows nothing of ranks, models or requests.
"""
