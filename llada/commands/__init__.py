"""The commands of `llada`, by subject. Heavy imports happen inside the command that needs them."""
