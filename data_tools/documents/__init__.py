"""Types of documents: text for pretraining, conversations for fine-tuning."""
