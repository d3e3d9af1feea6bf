"""The operations under the tables: contracts, kernels and the plain-torch reference."""
