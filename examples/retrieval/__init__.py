"""Two towers on MovieLens-100k, trained with sampled softmax, beside popularity."""
