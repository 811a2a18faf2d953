"""dar_train: data, losses, loops and recipes for training the tokenizer and the prior."""
