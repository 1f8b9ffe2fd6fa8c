"""From a CKA matrix to the layers that are kept. No torch, no processes, but for `judge`."""
