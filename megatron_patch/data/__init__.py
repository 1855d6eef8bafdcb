"""From text to the tokens Megatron trains on: corpus, tokenizer, dataset."""
