"""Where the blocks of a model live, and which fields of its configuration go with them."""
