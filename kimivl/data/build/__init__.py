"""`kimivl build`: chats as they are around -> WebDataset shards."""
