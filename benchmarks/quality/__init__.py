"""Does it help? Data x features x method x seed, each a training with its figures."""
