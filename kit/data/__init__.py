"""Data: files to conversations, splits, masks, tokens, the data check and repairs."""
