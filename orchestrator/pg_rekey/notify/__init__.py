"""Messages to people and other programs: webhooks and e-mail."""
