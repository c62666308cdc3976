"""What is split by vocabulary: the embedding, the logits, and what is computed of them without gathering them."""
