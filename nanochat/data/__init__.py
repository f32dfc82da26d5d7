"""From raw text to rows of tokens: corpus, tokenizer, token shards, conversations, loaders."""
