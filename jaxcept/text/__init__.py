"""Text: tokenizer, chat template, incremental detokenizer."""
