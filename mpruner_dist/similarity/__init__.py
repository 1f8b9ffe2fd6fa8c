"""How alike the layers are: HSIC sums over batches, CKA, and the worker job that collects them."""
