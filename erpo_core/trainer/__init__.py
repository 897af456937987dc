"""ERPOTrainer and its configuration."""
