"""What people read: results, figures, page, policy, W&B."""
