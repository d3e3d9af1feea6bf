"""DeepFM on MovieLens-100k and on Criteo files: one model, two data modules, two ways to run."""
