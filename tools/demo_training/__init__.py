"""The training program of the bundled model: data, autoencoder, transformer, evaluation."""
