"""Reading documents from files and datasets."""
